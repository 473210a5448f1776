#!/bin/sh
# Takes the Dockerfile's own steps through an isolated root made of Linux namespaces, without Docker, and runs
# medseg there as an unprivileged user, with a read-only root and without network.
#
#   docker/check_without_docker.sh [--quick] [--site-packages DIR]
#
# --quick               two epochs of the demo instead of all
# --site-packages DIR   take the dependencies from an environment that exists, instead of downloading them
#
# The base image is the host's own /usr and /etc, read-only (so apt-get and useradd are left out); everything else
# in the root is new. PYTHON: interpreter to build with (3.11 or newer). Needs user namespaces, util-linux 2.38.
set -eu
QUICK="" SITE=""
while [ $# -gt 0 ]; do
    case $1 in
        --quick) QUICK=1 ;;
        --site-packages) SITE=$(readlink -f "$2"); shift ;;
        *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
    shift
done
HERE=$(dirname "$(readlink -f "$0")")
CHECKOUT=$(dirname "$HERE")
PYTHON=${PYTHON:-python3}
PREFIX=$("$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))')
ROOT=$(mktemp -d)
SCRIPTS=$(mktemp -d)
trap 'rm -rf "$ROOT" "$SCRIPTS"' EXIT
DOCKERFILE="$HERE/Dockerfile"
RUN_AS=$("$PYTHON" "$HERE/steps.py" "$DOCKERFILE" user)

# ---- the steps of the Dockerfile; what the host's own system stands for does nothing
"$PYTHON" "$HERE/steps.py" "$DOCKERFILE" build /checkout > "$SCRIPTS/build"
mkdir "$SCRIPTS/instead"
for name in apt-get useradd; do printf '#!/bin/sh\n' > "$SCRIPTS/instead/$name"; done
cat > "$SCRIPTS/instead/python3" <<PYTHON3
#!/bin/sh
'$PREFIX/bin/python3' "\$@" || exit
[ "\$2" != venv ] || [ -z '$SITE' ] || for d in "\$3"/lib/python3*/site-packages; do echo /site > "\$d/host.pth"; done
PYTHON3
chmod +x "$SCRIPTS"/instead/*

# ---- what must work in the finished container
{
    echo 'set -eu'
    "$PYTHON" "$HERE/steps.py" "$DOCKERFILE" environment
    echo "MEDSEG='$("$PYTHON" "$HERE/steps.py" "$DOCKERFILE" entrypoint)'"
    cat <<'RUN'
say() { printf '\n== %s\n' "$*"; "$@"; }
[ "$(id -u)" != 0 ] || { echo "still root"; exit 1; }
! touch /usr/x /opt/x /x 2>/dev/null || { echo "the root can be written to"; exit 1; }
! grep -qvE 'lo:|Inter|face' /proc/net/dev || { echo "there is a network"; exit 1; }
cd /work
say $MEDSEG --help
say $MEDSEG demo --out demo --device cpu ${QUICK:+--epochs 2}
RUN_DIR=$(dirname "$(dirname "$(ls demo/*/models/model.pt)")")
SCANS=$(find demo -type d -name imagesTs | head -n 1)
say $MEDSEG predict "$RUN_DIR" "$SCANS" --out masks --device cpu
say python -m monai.bundle run --config_file "/work/$RUN_DIR/configs/inference.yaml" \
    --bundle_root "/work/$RUN_DIR" --dataset_dir "/work/$SCANS" --output_dir /work/bundle_masks
for mask in masks/*.nii.gz; do
    python - "$mask" "bundle_masks/$(basename "$mask")" <<'PY'
import sys
import nibabel
import numpy as np
ours, theirs = (np.asarray(nibabel.load(name).dataobj) for name in sys.argv[1:])
assert ours.shape == theirs.shape and (ours != theirs).mean() < 1e-3, sys.argv[1:]
PY
done
echo "container check: all done"
RUN
} > "$SCRIPTS/run"

# ---- the root: tmpfs, the host's system read-only, a fresh /dev, /proc and /tmp
cat > "$SCRIPTS/root" <<'INNER'
set -eu
mount -t tmpfs -o mode=755 tmpfs "$ROOT"
bind() { mkdir -p "$ROOT$1"; mount --rbind "$1" "$ROOT$1"; mount -o remount,bind,ro "$ROOT$1"; }
for d in usr etc bin sbin lib lib32 lib64; do
    if [ -L "/$d" ]; then cp -P "/$d" "$ROOT/$d"; elif [ -d "/$d" ]; then bind "/$d"; fi
done
case $PREFIX in /usr | /usr/*) ;; *) bind "$PREFIX" ;; esac
[ -z "$SITE" ] || { mkdir "$ROOT/site"; mount --bind "$SITE" "$ROOT/site"; mount -o remount,bind,ro "$ROOT/site"; }
[ ! -d "${PIP_FIND_LINKS:-}" ] || bind "$PIP_FIND_LINKS"
mkdir -p "$ROOT/checkout" "$ROOT/scripts" "$ROOT/proc" "$ROOT/dev/shm" "$ROOT/old" "$ROOT/run"
mkdir -p "$ROOT/tmp"; chmod 1777 "$ROOT/tmp"
mount --bind "$CHECKOUT" "$ROOT/checkout"
mount -o remount,bind,ro "$ROOT/checkout"
mount --bind "$SCRIPTS" "$ROOT/scripts"
# The host's name server, which /etc may only point to.
if [ -L /etc/resolv.conf ]; then
    to=$(readlink -f /etc/resolv.conf)
    mkdir -p "$ROOT$(dirname "$to")"
    [ ! -f "$to" ] || cp "$to" "$ROOT$to" 2>/dev/null || true
fi
for f in null zero full random urandom; do touch "$ROOT/dev/$f"; mount --bind "/dev/$f" "$ROOT/dev/$f"; done
mount -t proc proc "$ROOT/proc" 2>/dev/null || mount --rbind /proc "$ROOT/proc"
cd "$ROOT"
pivot_root . old
umount -l /old
rmdir /old
export HOME=/tmp PATH=/scripts/instead:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
echo "== building, in the Dockerfile's own steps"
sh /scripts/build
umount /checkout
rm -rf /src /wheels
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /work
mount -t tmpfs -o mode=1777,size=64m tmpfs /dev/shm
mount -o remount,ro /
echo "== running as user $RUN_AS, root read-only, no network"
exec unshare --user --map-user="$RUN_AS" --map-group="$RUN_AS" --net sh /scripts/run
INNER
export ROOT SCRIPTS CHECKOUT PREFIX SITE RUN_AS QUICK
unshare --user --map-root-user --mount --pid --fork --propagation private sh "$SCRIPTS/root"
