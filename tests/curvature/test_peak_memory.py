"""Peak resident memory above the model and the data, measured in processes of their own."""

import pytest
from memory_of import MEBIBYTE, needs_proc, script_output

SCRIPT = """
label = lambda n: torch.randint(5, (n,))

def wide():  # products by way of the positions: of one
    model = nn.Sequential(nn.Linear(20000, 200), nn.Tanh(), nn.Linear(200, 5))
    return model, torch.randn(600, 20000)

def patches():  # of four, whose patches take nine times the inputs
    model = nn.Sequential(
        nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.Flatten(),
        nn.Linear(512, 5),
    )
    return model, torch.randn(1200, 3, 2, 2)

def words():  # of eight words
    model = nn.Sequential(nn.Embedding(20000, 256), nn.Flatten(), nn.Linear(256 * 8, 5))
    return model, torch.randint(20000, (800, 8))

class Twice(nn.Module):  # a copy of the parameters an example
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(300, 300), nn.Linear(300, 5)

    def forward(self, x):
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

def twice():
    return Twice(), torch.randn(300, 300)

class Sequences(nn.Module):  # norms by columns, many positions an example
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(256, 512), nn.Linear(512, 5)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)).mean(1))

def sequences():
    return Sequences(), torch.randn(64, 300, 256)

model, x = locals()[sys.argv[1]]()
obj = ef.Objective(model, "cross_entropy", (x, label(len(x))))
ef.score_gram(obj, max_examples=1)  # what is done once for a model
tiny = ef.Objective(nn.Linear(9, 5), "cross_entropy", (torch.randn(7, 9), label(7)))

def call(obj, **budget):
    name, count = sys.argv[2], min(40, obj.num_examples)
    if name in ("memory", "disk"):
        ef.score_gram(obj, strategy=name, **budget)
    elif name == "recompute":
        ef.score_gram(obj, max_examples=count, strategy=name, **budget)
    elif name == "product":
        ef.FisherOperator(obj, **budget) @ torch.zeros(obj.num_params, 1)
    elif name == "eigenvalues":
        ef.fisher_eigenvalues(obj, 3, max_passes=10, **budget)
    else:
        {"spectrum": ef.score_spectrum, "norms": ef.gradient_norms}[name](obj, **budget)

call(tiny)  # the libraries' code is there
print(grown(lambda: call(obj, memory_budget=int(sys.argv[3]))))
"""


@needs_proc
@pytest.mark.parametrize(
    ("model", "function", "mebibytes"),
    [
        ("wide", "memory", 64),
        ("wide", "disk", 32),
        ("wide", "spectrum", 64),
        ("patches", "memory", 48),
        ("words", "disk", 48),
        ("words", "norms", 32),
        ("twice", "disk", 32),
        ("twice", "product", 48),
        ("twice", "eigenvalues", 64),
        ("sequences", "norms", 32),
    ],
)
def test_peak_memory_stays_within_the_budget_and_15_percent(
    model: str, function: str, mebibytes: int
):
    budget = mebibytes * MEBIBYTE
    assert int(script_output(SCRIPT, model, function, budget)) < 1.15 * budget


JETS = """
label = lambda n: torch.randint(5, (n,))

def network(channels, size, examples):
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5),
    )
    data = (torch.randn(examples, 3, size, size), label(examples))
    return ef.Objective(model, "cross_entropy", data)

def call(obj, columns, **budget):
    vectors = torch.randn(obj.num_params, columns)
    if sys.argv[1] == "jacobian":
        jacobian = ef.JacobianOperator(obj, **budget)
        return jacobian.T @ (jacobian @ vectors)
    operator = {"hessian": ef.HessianOperator, "ggn": ef.GGNOperator}[sys.argv[1]](obj, **budget)
    if sys.argv[2] == "forms":
        operator.quadratic_forms(vectors)
    for _ in range(3 if sys.argv[2] == "products" else 0):  # values kept from the third on
        operator @ vectors

call(network(4, 5, 3), 2)  # the libraries' code is there
obj = network(16, 16, 250)
print(grown(lambda: call(obj, 8, memory_budget=int(sys.argv[3]))))
"""


@needs_proc
@pytest.mark.parametrize(
    ("kind", "what"),
    [("hessian", "products"), ("hessian", "forms"), ("ggn", "products"), ("jacobian", "products")],
)
@pytest.mark.parametrize("mebibytes", [32, 96])
def test_products_and_forms_stay_within_the_budget_and_15_percent(
    kind: str, what: str, mebibytes: int
):
    budget = mebibytes * MEBIBYTE
    assert int(script_output(JETS, kind, what, budget)) < 1.15 * budget
