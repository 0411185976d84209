#!/bin/sh
# Install, upgrade or remove virt-usher. Running it again is always safe; ./install.sh --help says more.
#
# An upgrade may happen while domains run and hooks are in the middle of their work: each version lies
# in a folder of its own, one link is switched, and the version before stays until the next upgrade.
set -eu
umask 022
export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin

DESTDIR=${DESTDIR-}
PREFIX=${PREFIX-/usr/local}
SYSCONFDIR=${SYSCONFDIR-/etc}
HOOKS_DIR=${HOOKS_DIR-/etc/libvirt/hooks}
PYTHON=${PYTHON-/usr/bin/python3}

here=$(cd "$(dirname "$0")" && pwd)
lib=$PREFIX/lib/virt-usher
etc=$SYSCONFDIR/virt-usher
run=/run/virt-usher
unit=virt-usher-recover.service
sleep_unit=virt-usher-nosleep.service # the plugin services starts it
packages="python3 python3-lxml python3-pluggy python3-click python3-tomlkit python3-psutil python3-pyudev \
python3-rich python3-libvirt"

usage() {
    cat <<END
Usage: ./install.sh [OPTION]

Without an option: install virt-usher on this machine, or upgrade it.

  --deps        install the Python packages it needs first, with apt-get
  --demo        install all it takes to see it work, libvirt and QEMU too, with apt-get, and show it
                on a throw-away domain
  --uninstall   remove virt-usher, but not $etc; with --purge, that too
  --help        this text

Only --deps and --demo use the network. For packagers, from the environment:
  DESTDIR     a folder to install into; the running system is then neither touched nor asked
  PREFIX      $PREFIX
  SYSCONFDIR  $SYSCONFDIR
  HOOKS_DIR   $HOOKS_DIR
  PYTHON      $PYTHON
END
}

say() { printf '%s\n' "$@"; }

die() {
    say "$@" >&2
    exit 1
}

apt_install() {
    for package in "$@"; do
        shift
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            set -- "$@" "$package"
    done
    [ $# -gt 0 ] || return 0
    say "Installing with apt-get, which takes a minute or two: $*"
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update && apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"; } \
        </dev/null >"$log" 2>&1 || {
        cat "$log" >&2
        die "apt-get failed, as shown above."
    }
    rm "$log"
}

# ---- what must be true before anything is touched

check() {
    for path in "$PREFIX" "$SYSCONFDIR" "$HOOKS_DIR" "$PYTHON"; do
        case $path in
            *[!A-Za-z0-9/._+-]*) die "$path has characters that must not be in a path of virt-usher's" ;;
            /*) ;;
            *) die "$path is no absolute path" ;;
        esac
    done
    [ -z "$DESTDIR" ] || return 0
    [ "$(id -u)" = 0 ] || die "virt-usher is installed by root: sudo $0"
    # Not seen: SELinux. By the policy's sources, virtqemud may not execute a hook where it is enforced,
    # and a guest whose reconnect hook cannot be executed is killed.
    [ "$(cat /sys/fs/selinux/enforce 2>/dev/null)" != 1 ] ||
        die "SELinux is enforcing here, and its policy does not let libvirt run hooks: not supported yet." \
            "Nothing has been touched."
}

check_python() {
    missing=$("$PYTHON" -I -c '
import sys
from importlib.util import find_spec
missing = [m for m in ("lxml", "pluggy", "click", "tomlkit", "psutil") if not find_spec(m)]
print(*["Python 3.11"] * (sys.version_info < (3, 11)), *missing)' 2>/dev/null) || missing="an interpreter"
    [ -z "$missing" ] || die "What virt-usher needs is missing in $PYTHON: $missing" \
        "Nothing has been touched. Install it:" \
        "  apt-get install $packages" \
        "or let this script do that: $0 --deps"
    case $PYTHON in
        /usr/bin/* | /bin/*) ;;
        *) say "Note: libvirt's AppArmor profile lets a hook execute only what lies in /bin and /usr/bin." ;;
    esac
}

# What root loads at each start of a domain, root alone may be able to write.
check_owners() {
    set -- "$lib/releases" "$PREFIX/bin" "$etc/domains" "$etc/plugins" "$HOOKS_DIR" "$PYTHON"
    "$PYTHON" -I - "$@" >&2 <<'END' ||
import os, stat, sys
bad = {}
for path in sys.argv[1:]:
    for step in (path, os.path.realpath(path)):
        while step != os.path.dirname(step):
            if os.path.lexists(step) and not stat.S_ISLNK((status := os.lstat(step)).st_mode):
                open_to_others = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
                if status.st_uid or open_to_others:
                    bad[step] = None
            step = os.path.dirname(step)
if bad:
    print("Somebody else than root can write below these, and libvirt would run the result as root:")
    for step in bad:
        print(f"  chown root:root {step} && chmod go-w {step}")
    sys.exit(1)
END
        die "Nothing has been touched. Run these commands, or install elsewhere: PREFIX=/opt/virt-usher $0"
}

# ---- small tools

# rename(2) itself, for what must appear at once: mv would copy between file systems, and move into a
# folder, or a link to one.
rename() { "$PYTHON" -I -c 'import os, sys; os.replace(*sys.argv[1:])' "$1" "$2"; }

link() { # TARGET NAME: (re)make a link in one step
    rm -f "$2.new"
    ln -s "$1" "$2.new"
    rename "$2.new" "$2"
}

put() { # MODE FILE: stdin becomes the file, complete from the first moment on
    mkdir -p "$(dirname "$2")"
    cat >"$2.new"
    chmod "$1" "$2.new"
    mv -f "$2.new" "$2"
}

put_if_any() { # SOURCE FILE [SED-COMMAND]
    [ ! -f "$1" ] || sed "${3-}" "$1" | put 644 "$2"
}

contents() { # FOLDER: one word for all that is in it
    (cd "$1" && find . -type f ! -name '*.pyc' -exec sha256sum {} + | sort | sha256sum | cut -c1-12)
}

# ---- the pieces

install_release() {
    releases=$DESTDIR$lib/releases new=$releases/.new
    rm -rf "$new"
    mkdir -p "$new"
    cp -R "$here/src/virt_usher" "$here/plugins" "$new"
    find "$new" -name __pycache__ -exec rm -rf {} +
    sed "s|^CONFIG_DIR = .*|CONFIG_DIR = \"$etc\"|" "$here/src/virt_usher/host/__init__.py" \
        >"$new/virt_usher/host/__init__.py"
    chmod -R u=rwX,go=rX "$new"
    id=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/pyproject.toml")-$(contents "$new")
    if [ -d "$releases/$id" ] && [ "$(contents "$releases/$id")" != "${id##*-}" ]; then
        mv "$releases/$id" "$releases/.broken"
    fi
    [ -d "$releases/$id" ] || mv "$new" "$releases/$id"
    # Also where the release was there already: the interpreter may be another one now. Plugins are compiled
    # each time they are loaded, whoever wrote them.
    "$PYTHON" -I -m compileall -q "$releases/$id/virt_usher"
    before=$(readlink "$DESTDIR$lib/current" || true)
    if [ "$before" != "releases/$id" ]; then
        [ -z "$before" ] || link "$before" "$DESTDIR$lib/previous"
        link "releases/$id" "$DESTDIR$lib/current"
    fi
    keep=$(readlink "$DESTDIR$lib/previous" || true)
    for old in "$releases"/* "$releases/.new" "$releases/.broken"; do
        case releases/${old##*/} in
            "releases/$id" | "$keep") ;;
            *) rm -rf "$old" ;;
        esac
    done
}

install_command() {
    put 755 "$DESTDIR$PREFIX/bin/virt-usher" <<END
#!$PYTHON -IB
import os
import sys

sys.path.insert(0, os.path.realpath("$lib/current"))

from virt_usher.cli import main

main()
END
    put_if_any "$here/docs/man/virt-usher.8" "$DESTDIR$PREFIX/share/man/man8/virt-usher.8"
    put_if_any "$here/completions/virt-usher.bash" \
        "$DESTDIR$PREFIX/share/bash-completion/completions/virt-usher"
    put_if_any "$here/completions/virt-usher.zsh" "$DESTDIR$PREFIX/share/zsh/site-functions/_virt-usher"
    put_if_any "$here/completions/virt-usher.fish" \
        "$DESTDIR$PREFIX/share/fish/vendor_completions.d/virt-usher.fish"
}

install_config() {
    mkdir -p "$DESTDIR$etc/domains" "$DESTDIR$etc/plugins"
    [ -e "$DESTDIR$etc/config.toml" ] || put 644 "$DESTDIR$etc/config.toml" <"$here/data/config.toml"
}

ours() { [ -f "$1" ] && grep -q "^# virt-usher's " "$1"; }

# Where a hook of ours goes: beside a hook of the admin's own, or in its place where there is none.
hook_place() { # qemu | daemon
    place=$DESTDIR$HOOKS_DIR/$1
    if ours "$place"; then
        :
    elif [ -e "$place" ] || [ -L "$place" ]; then
        chains_hooks || die "$place is a hook of your own, and this libvirt would not call a second one:" \
            "it is older than 6.5, or not installed. Nothing has been touched. Either upgrade libvirt, or" \
            "move your hook away, and run this again."
        place=$place.d/50-virt-usher
    elif ours "$place.d/50-virt-usher"; then
        place=$place.d/50-virt-usher
    fi
    say "$place"
}

chains_hooks() { # whether libvirt calls what lies in qemu.d, too: since 6.5
    [ -z "$DESTDIR" ] || return 0
    for program in libvirtd virtqemud virsh; do
        version=$("$program" --version 2>/dev/null) || continue
        version=${version##* } major=${version%%.*} minor=${version#*.} minor=${minor%%.*}
        [ "$major" -gt 6 ] || { [ "$major" = 6 ] && [ "$minor" -ge 5 ]; }
        return
    done
    return 1
}

# The hook appears complete, by a rename from outside the hooks folders: whatever is executable in
# them is run, whatever its name.
put_hook() { # FILE: from stdin
    new=$DESTDIR$(dirname "$HOOKS_DIR")/.virt-usher.new
    mkdir -p "$(dirname "$1")"
    cat >"$new"
    chmod 755 "$new"
    if cmp -s "$new" "$1" && [ -x "$1" ]; then
        rm "$new"
    else
        rename "$new" "$1"
    fi
}

install_hooks() {
    sed "s|^etc=.*|etc=$etc run=$run lib=$lib/current python=$PYTHON|" "$here/hooks.d/qemu" | put_hook "$gate"
    for file in "$unit" "$sleep_unit"; do
        put_if_any "$here/data/$file" "$DESTDIR$PREFIX/lib/systemd/system/$file" "s|/usr/local|$PREFIX|"
    done
    if [ -n "$DESTDIR" ]; then
        :
    elif has_systemd; then
        systemctl --quiet --no-reload enable "$PREFIX/lib/systemd/system/$unit"
        systemctl --quiet daemon-reload
    else
        sed "s|^usher=.*|usher=$PREFIX/bin/virt-usher python=$PYTHON|" "$here/data/daemon" |
            put_hook "$daemon_hook"
    fi
}

has_systemd() { [ -d /run/systemd/system ]; }

# ---- the running daemon: it looks for hooks once, at its start, and again on SIGHUP

daemons() { # NAME PID START-TIME of each daemon here that has the QEMU driver
    for name in libvirtd virtqemud; do
        # Both write this file, under systemd too. Not seen: virtqemud; no Debian ships it.
        pid=$(cat "/run/$name.pid" 2>/dev/null) ||
            pid=$(systemctl show --property=MainPID --value "$name.service" 2>/dev/null) || continue
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$name" ] || continue
        stat=$(cat "/proc/$pid/stat")
        # shellcheck disable=SC2086
        set -- ${stat##*)}
        say "$name $pid ${20}"
    done
}

knows() { # PID START-TIME: whether a hook for QEMU was there when that daemon last looked
    told=
    grep -q -x "$1 $2" "$run/.told" 2>/dev/null && told=yes
    "$PYTHON" -I - "$2" "$told" "$HOOKS_DIR/qemu" "$HOOKS_DIR/qemu.d"/* <<'END'
import os, sys, time
age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(sys.argv[1]) / os.sysconf("SC_CLK_TCK")
hooks = [os.stat(f) for f in sys.argv[3:] if os.path.isfile(f) and os.access(f, os.X_OK)]
sys.exit(not any(sys.argv[2] or time.time() - h.st_ctime > age + 1 for h in hooks))
END
}

hook_runs() { # PID: whether that daemon waits for a hook
    children=$(cat "/proc/$1/task/"*/children 2>/dev/null) || return 1
    for child in $children; do
        ! grep -q -F "$HOOKS_DIR/" "/proc/$child/cmdline" 2>/dev/null || return 0
    done
    return 1
}

await_hooks() { # PID: a few seconds at most
    seconds=0
    while hook_runs "$1"; do
        seconds=$((seconds + 1))
        [ $seconds -le 10 ] || return 1
        sleep 1
    done
}

tell() { # PID
    # A reload while a hook runs holds up all of the QEMU driver until that hook ends. As this daemon knows
    # no QEMU hook, only other hooks (network, daemon) can be running; the moment between the look and
    # the signal is harmless for the same reason.
    # It answers nothing, but has looked long before this second is over.
    await_hooks "$1" && kill -HUP "$1" && sleep 1
}

tell_daemons() { # $knowing: those who knew a hook before this one came
    [ -d "$run" ] || mkdir -m 700 "$run"
    daemons | while read -r name pid start; do
        case $knowing in
            *" $pid $start;"*) ;;
            *)
                if tell "$pid"; then
                    say "Told the running $name (pid $pid) about its new hook." >&3
                else
                    say "Note: $name (pid $pid) runs a hook, and could not be told about the new one." \
                        "When it does not: kill -HUP $pid" >&3
                    continue
                fi
                ;;
        esac
        say "$pid $start"
    done 3>&1 >"$run/.told.new"
    mv -f "$run/.told.new" "$run/.told"
}

install_now() {
    check
    [ -n "$DESTDIR" ] || { check_python && check_owners; }
    gate=$(hook_place qemu)
    daemon_hook=$(hook_place daemon)
    [ -n "$DESTDIR" ] || knowing=$(daemons | while read -r _ pid start; do
        ! knows "$pid" "$start" || printf ' %s %s;' "$pid" "$start"
    done)
    install_release
    install_command
    install_config
    install_hooks
    [ -n "$DESTDIR" ] || tell_daemons
    say "virt-usher $id is installed; libvirt calls it as $gate."
}

# ---- the way out

# A domain that holds something must still get it back, and only the gate and the release do that. So
# nothing is removed while one does; a half-removed virt-usher that removes itself some day would be one
# more thing that nobody understands.
uninstall() {
    check
    if [ -z "$DESTDIR" ]; then
        [ -z "$(holders)" ] || "$PREFIX/bin/virt-usher" recover || true
        refuse_holders
        if [ -d "$etc" ] && [ ! -e "$etc/off" ]; then
            trap 'rm -f "$etc/off"' EXIT
            trap 'exit 1' HUP INT TERM
            : >"$etc/off" # no start begins any more; one that has begun is waited for
        fi
        daemons | while read -r name pid _; do
            await_hooks "$pid" ||
                die "$name (pid $pid) still runs a hook. Nothing has been removed; try again later."
        done
        refuse_holders
        ! has_systemd || systemctl --quiet disable "$unit" 2>/dev/null || true
    fi
    for hook in qemu daemon; do
        for place in "$DESTDIR$HOOKS_DIR/$hook" "$DESTDIR$HOOKS_DIR/$hook.d/50-virt-usher"; do
            ! ours "$place" || rm "$place"
        done
        rmdir "$DESTDIR$HOOKS_DIR/$hook.d" 2>/dev/null || true
    done
    for path in lib/virt-usher "lib/systemd/system/$unit" "lib/systemd/system/$sleep_unit" \
        bin/virt-usher share/man/man8/virt-usher.8 \
        share/bash-completion/completions/virt-usher share/zsh/site-functions/_virt-usher \
        share/fish/vendor_completions.d/virt-usher.fish; do
        rm -rf "${DESTDIR}${PREFIX:?}/$path"
    done
    if [ -z "$DESTDIR" ]; then
        rm -rf "$run" /var/lib/virt-usher
        ! has_systemd || systemctl --quiet daemon-reload
    fi
    if [ -n "$purge" ]; then
        rm -rf "$DESTDIR${etc:?}"
        say "virt-usher is removed, and its configuration with it."
    else
        say "virt-usher is removed. Its configuration stays in $etc, unless you give --purge, too."
    fi
}

holders() { # the domains that have a journal
    # shellcheck disable=SC2012 # a name has no newline: libvirt refuses it
    ls -A "$run" 2>/dev/null | sed -n 's/\.jnl$//p'
}

refuse_holders() {
    holding=$(holders)
    [ -z "$holding" ] || die "These domains still hold what virt-usher gave them:" "$holding" \
        "Nothing has been removed. Stop them, and run this again. To see what they hold: virt-usher status"
}

# ---- what to do with it

refused_now() { # tell at once which domains would not be let start from now on
    # libvirt does not answer while a hook runs for one of them.
    running=$(daemons | while read -r _ pid _; do ! hook_runs "$pid" || say busy; say "$pid"; done)
    case $running in '' | *busy*) return 0 ;; esac
    refused=$(timeout 10 "$PREFIX/bin/virt-usher" plan --json 2>/dev/null | "$PYTHON" -I -c '
import json, sys
for plan in json.load(sys.stdin):
    if plan["refused"]:
        print("  ", ascii(plan["domain"])[1:-1])' 2>/dev/null) || return 0
    [ -z "$refused" ] || say "" "A start of these domains would be refused now:" "$refused" \
        "Why, and what to do: virt-usher plan DOMAIN. To warn only, where a device cannot be reset:" \
        "refuse = false below [plugins.reset_check] in $etc/config.toml."
}

next_steps() {
    cat <<END

Next:
  virt-usher plugins                    what there is to switch on
  virt-usher enable DOMAIN hugepages    switch it on for a domain of yours
  virt-usher plan DOMAIN                see what a start would do, without doing it
  virsh start DOMAIN                    and then: virt-usher last DOMAIN
To switch it off for all domains: touch $etc/off
END
}

purge=
case "$*" in
    --deps | --demo) [ -z "$DESTDIR" ] || die "$1 is for this machine: not with DESTDIR" ;;
esac
case "$*" in
    --help | -h) usage ;;
    '' | --deps)
        # shellcheck disable=SC2086
        [ -z "${1-}" ] || apt_install $packages
        install_now
        [ -n "$DESTDIR" ] || { refused_now && next_steps; }
        ;;
    --demo)
        check
        # shellcheck source=demo/demo.sh
        . "$here/demo/demo.sh"
        demo
        next_steps
        ;;
    --uninstall) uninstall ;;
    "--uninstall --purge") purge=yes && uninstall ;;
    *)
        usage >&2
        exit 2
        ;;
esac
