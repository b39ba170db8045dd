#!/bin/sh
# README's way from nothing, tried: a fresh Debian with the packages that README names, a user who is not root, a clone
# of this checkout's last commit, and a command.
#
#     sh tools/fresh_debian.sh SUITE FOLDER ["make demo"]      as root, with debootstrap; SUITE: bookworm, trixie ...
#
# FOLDER is kept; a second call uses the Debian in it, with a clone of its own. pip is set up there as here: it gets the
# variables PIP_*, and SHARED names files and folders of this machine that are visible there (wheels, certificates).
set -eu
suite=$1
mkdir -p "$2"
root=$(cd "$2" && pwd)
command=${3:-make demo}
cd "$(dirname "$0")/.."
packages=$(sed -n 's/.*sudo apt install \([a-z0-9 -]*\).*/\1/p' README.md | head -n 1)

[ -e "$root/etc/debian_version" ] || debootstrap --variant=minbase "$suite" "$root"
rm -rf "$root/home/newcomer"
chroot "$root" id newcomer >/dev/null 2>&1 || chroot "$root" useradd --shell /bin/sh newcomer
mkdir -p "$root/home/newcomer"
git clone --quiet "file://$PWD" "$root/home/newcomer/penstock"
chroot "$root" chown -R newcomer: /home/newcomer

mounted=
trap 'for place in $mounted; do umount "$place"; done' EXIT
show() { # a file or folder of this machine, at the same place there
    if [ -d "$1" ]; then
        mkdir -p "$root$1"
    else
        mkdir -p "$root$(dirname "$1")"
        [ -e "$root$1" ] || : >"$root$1"
    fi
    mount --bind -o ro "$1" "$root$1"
    mounted="$root$1 $mounted"
}
mount -t proc proc "$root/proc"
mounted=$root/proc
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mounted="$root/dev/pts $mounted"
ln -sf pts/ptmx "$root/dev/ptmx"
mkdir -p "$root/dev/shm"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mounted="$root/dev/shm $mounted"
show /etc/resolv.conf
show /etc/hosts  # an installation names the machine in it, debootstrap does not, and torchrun looks it up
chroot "$root" apt-get -qq update
# shellcheck disable=SC2086  # a list of names
DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get -qq install $packages >/dev/null
for path in ${SHARED:-}; do show "$path"; done

set -- env -i HOME=/home/newcomer PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8
for name in $(env | sed -n 's/^\(PIP_[A-Z_]*\)=.*/\1/p'); do
    eval "set -- \"\$@\" $name=\"\$$name\""
done
chroot --userspec=newcomer "$root" "$@" sh -euc "cd ~/penstock && $command"
