"""The table of models in README is what the code says."""

from pathlib import Path

import pytest

from benchmarks.model_cards import MODELS, row

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.rare
def test_readme_shows_what_the_command_prints():
    for name, model in MODELS.items():
        assert f"| {' | '.join(row(name, *model))} |" in README, f"python -m benchmarks.model_cards, and paste ({name})"
