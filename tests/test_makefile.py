"""What the Makefile's targets run."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_benchmark_has_a_target():
    commands = (ROOT / "Makefile").read_text().split()
    programs = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
    assert len(programs) >= 6
    assert {path.stem for path in programs} == {word[11:] for word in commands if word.startswith("benchmarks.")}
