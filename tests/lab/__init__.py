"""An emulated machine with a real kernel and libvirt, as a test bed."""
