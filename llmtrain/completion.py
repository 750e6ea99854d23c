"""Completion for bash: `eval "$(llmtrain completion)"`.

Commands complete by themselves; of `run` and `plan` also groups, choices and keys, which Hydra
knows; of all others files.
"""

import sys

from llmtrain.__main__ import COMMANDS
from llmtrain.errors import DONE

# A word as bash cuts it ends at = and :, so what stands before the last of them is cut off again.
# Readline's own rules stay as they are for other commands.
SCRIPT = """\
_llmtrain() {
    local command=${COMP_WORDS[1]} line=${COMP_LINE:0:COMP_POINT} word known choice
    word=${line##*[[:space:]]}
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        known="COMMANDS"
    elif [[ $command == run || $command == plan ]]; then
        line=${line#*[[:space:]]}
        known=$(COMP_LINE=$line "$1" "$command" -sc query=bash 2> /dev/null)
    fi
    local cut=${word%"${word##*[=:]}"} choices
    read -ra choices <<< "$known"
    for choice in "${choices[@]}"; do
        ((COMP_CWORD == 1)) || [[ $choice == *[=./]* ]] || choice+="="
        [[ $choice == schema* || $choice != "$word"* ]] || COMPREPLY+=("${choice#"$cut"}")
    done
    [[ ${COMPREPLY[0]} != *[=./] ]] || compopt -o nospace 2> /dev/null
}
complete -o default -F _llmtrain llmtrain
"""


def main() -> int:
    """Print what bash evaluates."""
    print(SCRIPT.replace("COMMANDS", " ".join(COMMANDS)), end="")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
