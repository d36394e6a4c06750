#!/usr/bin/env bash
# Installs Stillpoint for systemd, the way a Debian package would lay it out:
#
#   install.sh WHEEL          as root: /opt/stillpoint, units, user, example configuration
#   DESTDIR=/some/tree install.sh WHEEL
#
# Programs are in an environment of their own under /opt/stillpoint, so nothing of the system's Python is touched.
# Configuration that is there already stays as it is. Nothing is started or enabled. Run again to upgrade.
# PIP_ARGUMENTS: for pip, such as "--no-index --find-links wheels" where there is no package index.
set -euo pipefail

[ $# = 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
wheel=$1
here=$(cd "$(dirname "$0")" && pwd)
root=${DESTDIR:-}
prefix=/opt/stillpoint

if [ ! -x "$root$prefix/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$root$prefix"
fi
"$root$prefix/bin/python" -m pip install --quiet --upgrade ${PIP_ARGUMENTS:-} "$wheel"
if [ -n "$root" ]; then
  # The programs name their interpreter by its path.
  sed -i "1s|^#!$root|#!|" "$root$prefix"/bin/stillpoint-* "$root$prefix/bin/standbyctl"
fi

install -D -m 0644 -t "$root/usr/lib/systemd/system" "$here"/stillpoint*.service "$here/stillpoint.target"
install -D -m 0644 "$here/sysusers.conf" "$root/usr/lib/sysusers.d/stillpoint.conf"
install -D -m 0644 -t "$root$prefix/share/doc/stillpoint" "$here/../OPERATING.md" "$here"/*.conf
install -d -m 0755 "$root/usr/bin"
ln -sf "$prefix/bin/standbyctl" "$root/usr/bin/standbyctl"
[ -e "$root/etc/default/stillpoint" ] || install -D -m 0644 "$here/default" "$root/etc/default/stillpoint"
install -d -m 0750 "$root/etc/stillpoint"
install -D -m 0644 -t "$root$prefix/share/doc/stillpoint/config" "$here"/config/*.yaml

if [ -z "$root" ]; then
  systemd-sysusers /usr/lib/sysusers.d/stillpoint.conf
  chgrp stillpoint /etc/stillpoint
  systemctl daemon-reload
fi
echo "Installed. Next: copy a file of $prefix/share/doc/stillpoint/config to /etc/stillpoint, and"
echo "  systemctl enable --now stillpoint.target stillpoint-NODE.service     (primary, standby or backup)"
