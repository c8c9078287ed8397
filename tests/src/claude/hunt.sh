# Looks for credentials wherever a process can look, and prints each place that has one. The arguments are files and directories
# besides PLACES, which are the usual ones unless said; PIDS limits the processes, which are otherwise all that can be seen.

# Does not find itself: brackets are not in what it describes.
pattern='sk-an[t]-[A-Za-z0-9-]+'

found() {
  grep -aoE "$pattern" | sort -u | while read -r secret; do echo "FOUND $1: $secret"; done
}

look() {
  if { exec 3<"$2"; } 2>/dev/null; then
    echo "LOOKED at $1"
    found "$1" <&3 2>/dev/null
    exec 3<&-
  else
    echo "REFUSED $1"
  fi
}

for pid in ${PIDS:-1 2 $PPID $(ls /proc | grep -E '^[0-9]+$')}; do
  look "environment of $pid" "/proc/$pid/environ"
  look "arguments of $pid" "/proc/$pid/cmdline"
  for descriptor in "/proc/$pid/fd/"*; do
    if [[ -f $descriptor ]]; then look "descriptor ${descriptor##*/} of $pid" "$descriptor"; fi
  done
  if { exec 4<"/proc/$pid/maps"; } 2>/dev/null; then
    echo "LOOKED at memory of $pid"
    while read -r range permissions _ <&4; do
      if [[ $permissions != rw* ]]; then continue; fi
      start=$((16#${range%-*})) end=$((16#${range#*-}))
      size=$((end - start))
      if ((size > 64 << 20)); then size=$((64 << 20)); fi
      dd if="/proc/$pid/mem" bs=1M iflag=skip_bytes,count_bytes skip="$start" count="$size" status=none 2>/dev/null |
        found "memory of $pid"
    done
    exec 4<&-
  else
    echo "REFUSED memory of $pid"
  fi
done | sort -u

for place in ${PLACES:-/run /etc /var /tmp /workspace /home /root /opt /srv /mnt /dev/shm} "$@"; do
  grep -HraoE -D skip "$pattern" "$place" 2>/dev/null | while IFS= read -r line; do echo "FOUND file ${line%%:*}: ${line##*:}"; done
done | sort -u
echo "HUNTED to the end"
