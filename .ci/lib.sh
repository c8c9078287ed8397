# shellcheck shell=bash
# Shared by the gates: one step = one title, one log, one duration, one verdict.
#
# A step is a command. Exit 0 is a pass, 77 is "skipped, the last line of its output says why", anything else a
# failure. A skip of a promised step is a failure when CI=true: a machine that lost a component must not stay green.
# Steps never stop the gate, except through `require`: the summary always names everything that is wrong.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
gate_dir=$root/target/ci
mkdir -p "$gate_dir/log"
export PATH="$gate_dir/bin:$PATH"
# shellcheck disable=SC2034 # for those who source this
host_target=$(rustc -vV | sed -n 's/^host: //p')

step_number=0
passed=0
failed=0
skipped=0
failed_titles=()
gate_started=$SECONDS

# run_step PROMISED|OPTIONAL TITLE COMMAND...
run_step() {
  local kind=$1 title=$2 started=$SECONDS code=0 log
  shift 2
  step_number=$((step_number + 1))
  log=$gate_dir/log/$(printf '%02d' "$step_number")-$(tr -cs 'a-zA-Z0-9\n' '-' <<<"$title").log
  printf '== %02d %s\n' "$step_number" "$title"
  # Not `if "$@"`: that would switch errexit off inside functions.
  set +e
  (set -euo pipefail; "$@") >"$log" 2>&1 </dev/null
  code=$?
  set -e
  local took=$((SECONDS - started))
  case $code in
    0)
      passed=$((passed + 1))
      sed -n 's/^note: /   /p' "$log"
      printf '   passed in %d s\n' "$took"
      ;;
    77)
      if [[ $kind == PROMISED && ${CI:-} == true ]]; then
        printf '   FAILED in %d s: promised here, but skipped: %s\n' "$took" "$(tail -n 1 "$log")"
        failed=$((failed + 1))
        failed_titles+=("$title")
      else
        printf '   skipped in %d s: %s\n' "$took" "$(tail -n 1 "$log")"
        skipped=$((skipped + 1))
      fi
      ;;
    *)
      printf '   FAILED in %d s with exit code %d; the end of %s:\n' "$took" "$code" "${log#"$root"/}"
      tail -n 60 "$log" | sed 's/^/   | /'
      failed=$((failed + 1))
      failed_titles+=("$title")
      ;;
  esac
  return 0
}

step() { run_step PROMISED "$@"; }
optional_step() { run_step OPTIONAL "$@"; }

# Like `step`, but nothing after it makes sense without it.
require() {
  local before=$failed
  run_step PROMISED "$@"
  if ((failed > before)); then
    finish
  fi
}

# Ends a step as skipped.
skip() {
  printf '%s\n' "$*"
  exit 77
}

# A line that is shown under the title of a step that passed.
note() { printf 'note: %s\n' "$*"; }

# Prints the totals as the last line, and ends the gate.
finish() {
  printf '\n%d s in total\n' "$((SECONDS - gate_started))"
  local title
  for title in ${failed_titles[@]+"${failed_titles[@]}"}; do
    printf 'failed: %s\n' "$title"
  done
  printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
  ((failed == 0)) || exit 1
  exit 0
}

# The command between `<!-- command: NAME -->` and the next code fence end in README.md, so that what the gate runs is
# literally what a reader is told to run.
readme_command() {
  local command
  command=$(awk -v marker="<!-- command: $1 -->" '
    $0 == marker { found = 1; next }
    found && /^```/ { if (inside) exit; inside = 1; next }
    found && inside { print }' README.md)
  [[ -n $command ]] || { echo "README.md has no command marked '$1'" >&2; return 1; }
  printf '%s\n' "$command"
}
