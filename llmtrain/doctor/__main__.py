"""`python -m llmtrain.doctor`, also where what it needs itself is not installed."""

import sys

from llmtrain.errors import FAILED


def main() -> int:
    try:
        from llmtrain.doctor.command import main as examine
    except ImportError as error:
        print(f"{error}; run: pip install -c constraints.txt -e .", file=sys.stderr)
        return FAILED
    return examine()


if __name__ == "__main__":
    sys.exit(main())
