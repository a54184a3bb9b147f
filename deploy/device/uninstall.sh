#!/bin/sh
# Stop edgevl-caption and take back what install.sh left.
#
#   uninstall.sh [--purge]      as root; --purge deletes settings, captions and the user too
#
# ROOT, a folder, is cleaned instead of /, and nothing is stopped.
set -eu

ROOT=${ROOT:-}
purge=no
case ${1:-} in
'') ;;
--purge) purge=yes ;;
*) echo "uninstall.sh: $1 is not known; the only option is --purge" >&2; exit 2 ;;
esac
if [ -z "$ROOT" ]; then
    [ "$(id -u)" = 0 ] || { echo "uninstall.sh: run it as root" >&2; exit 2; }
    systemctl disable --now edgevl-caption 2>/dev/null || true
fi
rm -f "$ROOT/etc/systemd/system/edgevl-caption.service"
[ -n "$ROOT" ] || systemctl daemon-reload
if [ "$purge" = yes ]; then
    rm -f "$ROOT/etc/edgevl/caption.conf"
    rmdir "$ROOT/etc/edgevl" 2>/dev/null || true
    rm -rf "$ROOT/var/lib/edgevl" "$ROOT/var/cache/edgevl"
    if [ -z "$ROOT" ] && getent passwd edgevl >/dev/null; then
        userdel edgevl
    fi
else
    echo "kept: $ROOT/etc/edgevl/caption.conf and the captions in $ROOT/var/lib/edgevl; --purge deletes them"
fi
