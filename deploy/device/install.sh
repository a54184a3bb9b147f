#!/bin/sh
# Install edgevl-caption as a systemd service that starts with the machine.
#
#   install.sh BUNDLE SOURCE...      as root; edgevl must be installed (pip install 'edgevl[caption]', with a GPU's bundle 'edgevl[caption,cuda]')
#
# Leaves: the user edgevl, /etc/edgevl/caption.conf (an existing one is kept), the unit. uninstall.sh takes them back.
# EDGEVL names the command if it is not on the PATH. ROOT, a folder, gets everything instead of /, and nothing is started.
set -eu

fail() { echo "install.sh: $*" >&2; exit 2; }

ROOT=${ROOT:-}
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 2 ] || fail "give the bundle and at least one source: install.sh BUNDLE SOURCE..."
bundle=$1
shift
[ -f "$bundle/manifest.json" ] || fail "$bundle is no bundle; build one with edgevl build"
bundle=$(cd "$bundle" && pwd)
case $bundle in *[[:space:]\"\'\$\\]*) fail "$bundle has spaces or quotes in its path; move the bundle" ;; esac
edgevl=${EDGEVL:-$(command -v edgevl || true)}
[ -x "$edgevl" ] || fail "the command edgevl is not here; pip install 'edgevl[caption]' (a GPU's bundle: 'edgevl[caption,cuda]'), or set EDGEVL"
case $edgevl in *[[:space:]\"\'\|\&\\%]*) fail "$edgevl has special characters in its path; install edgevl elsewhere" ;; esac
sources=
for source in "$@"; do
    case $source in *[\"\'\$\`\\]*) fail "the source $source has quotes, \$ or \\ in it; write it into caption.conf yourself" ;; esac
    case $source in *' '*) source="'$source'" ;; esac
    sources="$sources${sources:+ }$source"
done

if [ -z "$ROOT" ]; then
    [ "$(id -u)" = 0 ] || fail "run it as root, or set ROOT to a folder to look at what it does"
    command -v systemctl >/dev/null || fail "there is no systemctl here; run edgevl caption by what starts services here"
    getent passwd edgevl >/dev/null || useradd --system --user-group --no-create-home --shell /usr/sbin/nologin edgevl
    as_edgevl="setpriv --reuid=edgevl --regid=edgevl --clear-groups"
    $as_edgevl "$edgevl" --version >/dev/null ||
        fail "the user edgevl cannot run $edgevl; install edgevl where every user may read, such as /opt/edgevl/venv"
    $as_edgevl test -r "$bundle/manifest.json" ||
        fail "the user edgevl cannot read $bundle; move it to where every user may read, such as /opt/edgevl/bundle"
fi

mkdir -p "$ROOT/etc/edgevl" "$ROOT/etc/systemd/system"
unit=$ROOT/etc/systemd/system/edgevl-caption.service
sed "s|@EDGEVL@|$edgevl|" "$here/edgevl-caption.service" >"$unit.new"
chmod 644 "$unit.new"
mv "$unit.new" "$unit"
conf=$ROOT/etc/edgevl/caption.conf
if [ -e "$conf" ]; then
    echo "$conf is there already and stays as it is"
else
    # the shell writes these lines, so that no character of a source means anything to sed
    while IFS= read -r line; do
        case $line in
        BUNDLE=*) printf 'BUNDLE=%s\n' "$bundle" ;;
        SOURCES=*) printf 'SOURCES="%s"\n' "$sources" ;;
        *) printf '%s\n' "$line" ;;
        esac
    done <"$here/caption.conf" >"$conf.new"
    chmod 600 "$conf.new"
    mv "$conf.new" "$conf"
fi

[ -n "$ROOT" ] && exit 0
systemctl daemon-reload
systemctl enable edgevl-caption
systemctl restart edgevl-caption
systemctl --no-pager status edgevl-caption
