"""`python -m llmtrain.report`: compare runs."""

import sys

from llmtrain.report.command import main

if __name__ == "__main__":
    sys.exit(main())
