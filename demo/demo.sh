# shellcheck shell=sh
# Part of install.sh --demo: show on a throw-away domain what virt-usher does. The domain needs huge pages
# that this host does not have, nothing else: no disk, no network, no KVM.

demo_name=virt-usher-demo
demo_pool=/sys/kernel/mm/hugepages/hugepages-2048kB

demo() {
    demo_check
    # shellcheck disable=SC2086,SC2154
    apt_install $packages libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86
    install_now
    demo_daemon
    trap 'demo_virsh destroy "$demo_name" >/dev/null 2>&1' EXIT
    trap 'exit 1' HUP INT TERM
    demo_virsh destroy "$demo_name" >/dev/null 2>&1 || true # of a demo that was killed
    before=$(demo_pages nr) free=$(demo_pages free)
    pages=$((32 + (free < 512 ? free : 0)))
    demo_step "The host's pool has $before huge pages of 2 MiB, $free of them free; the domain needs $pages."
    demo_xml | sed -n '/<metadata>/,/<\/memoryBacking>/p'
    demo_start
    during=$(demo_pages nr)
    demo_step "It runs, and the pool has $during pages. What virt-usher holds for it (virt-usher status):"
    "$PREFIX/bin/virt-usher" status "$demo_name" || true
    demo_step "virsh destroy $demo_name"
    demo_virsh destroy "$demo_name"
    trap - EXIT
    tries=0 # libvirt may answer before its hook ends
    while [ "$(demo_pages nr)" != "$before" ] && [ $tries -lt 10 ]; do
        tries=$((tries + 1))
        sleep 1
    done
    demo_step "All that virt-usher did, and how long it took (virt-usher last $demo_name):"
    "$PREFIX/bin/virt-usher" last "$demo_name" || true
    demo_step "The pool had $before pages before, $during while the domain ran, and has $(demo_pages nr) now."
    [ "$(demo_pages nr)" = "$before" ] || die "That is not as it was: please report it, with these lines."
    say "The domain is gone. virt-usher and the packages stay${demo_left-}."
}

demo_check() { # and mount what libvirt's daemon must find at its start
    [ -w $demo_pool/nr_hugepages ] ||
        die "There is nothing to show here: this host cannot be given huge pages of 2 MiB ($demo_pool)."
    # shellcheck disable=SC2154
    [ ! -e "$etc/off" ] || die "virt-usher is switched off here: rm $etc/off"
    ! grep -q ' hugetlbfs .*pagesize=2M' /proc/mounts || return 0
    demo_step "Mounting hugetlbfs on /dev/hugepages"
    mkdir -p /dev/hugepages
    mount -t hugetlbfs -o pagesize=2M hugetlbfs /dev/hugepages
    [ -z "$(daemons)" ] || die "libvirt's daemon runs, and looks for this mount only at its start." \
        "Restart it when it suits you (systemctl restart libvirtd), then run this again."
}

demo_daemon() {
    if [ -z "$(daemons)" ]; then
        demo_step "Starting libvirt's daemon"
        if has_systemd; then
            systemctl start libvirtd.service || systemctl start virtqemud.service
        else
            virtlogd --daemon 2>/dev/null || true # it may run already; if not, the start of the domain tells
            libvirtd --daemon
            demo_left=", and so does libvirtd (pid $(cat /run/libvirtd.pid))"
        fi
    fi
    demo_virsh list >/dev/null # answers when all of it is up
}

demo_start() {
    demo_step "virsh create $demo_name"
    say "(libvirt asks QEMU first what it can: seconds, a minute where /dev/kvm is there but does not work)"
    demo_xml | demo_virsh create /dev/stdin
}

demo_virsh() { timeout 300 virsh --quiet --connect qemu:///system "$@"; }

demo_pages() { cat "$demo_pool/${1}_hugepages"; }

demo_step() { printf '\n== %s\n' "$*"; }

demo_xml() {
    cat <<END
<domain type='qemu'>
  <name>$demo_name</name>
  <metadata>
    <usher:domain xmlns:usher='urn:virt-usher:domain:1'>
      <usher:plugin name='hugepages'/>
      <usher:plugin name='governor'/>
    </usher:domain>
  </metadata>
  <memory unit='MiB'>$((pages * 2))</memory>
  <memoryBacking>
    <hugepages><page size='2' unit='MiB'/></hugepages>
  </memoryBacking>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
END
}
