"""``python -m saccade`` and the command ``saccade``."""

import sys


def main() -> None:
    """Run the command line; ``doctor`` works with torch alone installed, the rest needs the ``demo`` extra."""
    if sys.argv[1:2] == ["doctor"]:
        from saccade.doctor import main as doctor

        sys.exit(doctor(sys.argv[2:]))
    try:
        from saccade.cli import app
    except ModuleNotFoundError as error:
        print(f"saccade: {error.name} is not installed; `pip install 'saccade-ops[demo]'` brings it", file=sys.stderr)
        sys.exit(2)
    app(prog_name="saccade")


if __name__ == "__main__":
    main()
