#!/bin/bash
# stop.sh RUN SLOT: ends what start.sh started with these, and nothing else.
R=$1 SLOT=$2 NS=ovk$2
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
if [ -e "$R/init.pid" ]; then
  pid=$(cat "$R/init.pid")
  # Its number may be another's by now.
  if tr '\0' ' ' </proc/"$pid"/cmdline 2>/dev/null | grep -qF -- "$R/varlog"; then
    kill -9 "$pid" 2>/dev/null
    for _ in $(seq 100); do
      kill -0 "$pid" 2>/dev/null || break
      sleep .05
    done
  fi
fi
for _ in $(seq 50); do
  left=$(find /sys/fs/cgroup/*/"$NS" -depth -type d -exec rmdir {} \; 2>&1)
  [ -z "$(ls -d /sys/fs/cgroup/*/"$NS" 2>/dev/null)" ] && break
  sleep .1
done
ip link del "$NS" 2>/dev/null
ip netns del "$NS" 2>/dev/null
awk -v r="$R/" 'index($2, r) == 1 { print $2 }' /proc/mounts | sort -r | while read -r mount; do umount -l "$mount"; done
rm -rf --one-file-system "$R"
true
