"""What the README shows runs as it is shown."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(compile(block, "README.md", "exec"), names)
    header = (tmp_path / "profile.csv").read_text().splitlines()[0]
    assert header.startswith("s,loss,accuracy,fisher_trace")
    assert "±" in capsys.readouterr().out


def test_images_exist():
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).is_file(), target


def test_commands_of_the_readme_are_one_line_each():
    for name in ("demo", "test"):
        (command,) = re.findall(rf"<!-- {name} command -->\n```sh\n(.*?)\n```", README, flags=re.S)
        assert "\n" not in command and ".venv" in command
