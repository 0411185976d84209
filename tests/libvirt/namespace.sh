#!/bin/sh
# PID 1 of the namespace in which the tests' own libvirt lives. $1 is the checkout.
#
# Everything a libvirt daemon or the installer writes is made private; the rest is read-only, so that
# neither can touch the host, and an installer that writes elsewhere is found out. Only /sys is the
# host's: the huge pages of these tests are real.
set -eu

# The lifeline: the tests hold the other end. When they end, however they end, so does this shell,
# and with it everything in the PID namespace.
exec 3<&0 </dev/null

mount --make-rprivate /
mount -t tmpfs -o mode=755,nosuid tmpfs /run
mkdir /run/checkout /run/private
mkdir -m 1777 /run/lock
mount --bind "$1" /run/checkout
mount -o remount,bind,ro /run/checkout

for folder in /etc /var/lib /var/log /var/cache /usr/local; do
    layer=/run/private$folder
    mkdir -p "$layer/upper" "$layer/work"
    mount -t overlay -o "lowerdir=$folder,upperdir=$layer/upper,workdir=$layer/work" private "$folder"
done
for folder in /tmp /var/tmp /root /home; do
    mount -t tmpfs -o mode=1777 tmpfs "$folder"
done
mount -o remount,bind,ro /

# Nothing of the host's own libvirt or virt-usher: no domains, networks, hooks, records.
rm -rf /etc/libvirt /etc/virt-usher /var/lib/libvirt /var/lib/virt-usher /var/log/libvirt /var/cache/libvirt \
    /usr/local/bin/virt-usher /usr/local/lib/virt-usher
mkdir -p /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
cat >/etc/libvirt/libvirtd.conf <<'END'
auth_unix_rw = "none"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
END
cat >/etc/libvirt/qemu.conf <<'END'
security_driver = "none"
END

# A /dev without kvm: where it exists and does not work, libvirt probes QEMU anew at every start (10 s).
# And without the host's huge pages below it: libvirt moves each mount in /dev that it finds, and cannot that.
if mountpoint -q /dev/hugepages; then
    umount -l /dev/hugepages
fi
mount -t tmpfs -o mode=755 tmpfs /dev
mknod -m 666 /dev/null c 1 3
mknod -m 666 /dev/zero c 1 5
mknod -m 666 /dev/full c 1 7
mknod -m 666 /dev/random c 1 8
mknod -m 666 /dev/urandom c 1 9
mknod -m 666 /dev/tty c 5 0
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
mkdir /dev/pts /dev/shm /dev/hugepages
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts /dev/pts
ln -s pts/ptmx /dev/ptmx
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
# The daemon reads its hugetlbfs mounts once, at its start.
mount -t hugetlbfs hugetlbfs /dev/hugepages

# Where libvirt sees no cgroups it makes none: they would be the host's. Merely covered, it still sees them.
if mountpoint -q /sys/fs/cgroup; then
    umount -l -R /sys/fs/cgroup
fi

echo ready
exec >/dev/null
# wait(1) reaps whatever dies here, orphans too. libvirt waits for its children to vanish: a zombie hangs it.
cat <&3 >/dev/null &
wait $!
