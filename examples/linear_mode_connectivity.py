"""Linear mode connectivity: when in training do two data orders end in one basin?

Train to epoch k, finish twice with different data orders, join the two by a straight line, and
compare how far loss and curvature rise on it. Digits, 14,378 parameters.
"""

import entropic_fast as ef
from entropic_fast.training import TrainConfig
from entropic_fast.training.data import load


def main(epochs: int = 8, branches: tuple[int, ...] = (0, 2, 6), points: int = 5) -> None:
    data, test = load("digits", limit=512)
    result = ef.linear_mode_connectivity(
        "digits-cnn",
        data,
        TrainConfig(epochs=epochs, batch_size=32, augment=False),
        epochs=branches,
        settings=ef.LineSettings(points=points, curvature_examples=128),
        eval_data=test,
    )
    for row in result.instability.rows():
        print(
            "k = {k}: barrier {barrier:.4f} nats, instability of the loss {loss_instability:.3g}, "
            "of the largest eigenvalue {eigenvalue_instability:.3g}".format(**row)
        )
    line = result.table.where(k=branches[0])
    print("loss on the first line:", " ".join(f"{loss:.3f}" for loss in line["loss"]))


if __name__ == "__main__":
    main()
