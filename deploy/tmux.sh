#!/usr/bin/env bash
# A run that outlives this login: it goes on in a tmux session of its own, and continues by itself
# after a stop with a checkpoint (exit code 75).
#
#   deploy/tmux.sh small model=llama_50m data=text data.path=my_texts
#   tmux attach -t small        # look; Ctrl+B D leaves it running, Ctrl+C saves and stops
set -euo pipefail

[ $# -ge 1 ] || { echo "Use: $0 SESSION [WORD ...]" >&2; exit 2; }
session=$1
shift

if [ "${LLMTRAIN_IN_TMUX:-}" = "$session" ]; then
    stopped=0
    trap 'stopped=1' INT TERM  # the run gets Ctrl+C as well, and saves: then it is not continued
    while true; do
        code=0
        "${LLMTRAIN:-llmtrain}" run "$@" || code=$?
        [ $code -eq 75 ] && [ $stopped -eq 0 ] || break
        echo "Stopped with a checkpoint: continuing."
    done
    echo "Ended with exit code $code."
    exec "${SHELL:-bash}"  # keeps what was said on the screen
fi

command -v tmux > /dev/null || { echo "tmux is missing; run: apt-get install tmux" >&2; exit 2; }
command -v "${LLMTRAIN:-llmtrain}" > /dev/null ||
    { echo "llmtrain is not on the PATH; activate its environment first" >&2; exit 2; }
tmux new-session -d -s "$session" -c "$PWD" \
    env LLMTRAIN_IN_TMUX="$session" LLMTRAIN="${LLMTRAIN:-llmtrain}" PATH="$PATH" \
    "$(realpath "$0")" "$session" "$@"
echo "tmux attach -t $session"
