"""What a compositor does with a graphics card: asks logind for it, through libseat, and keeps it."""

from __future__ import annotations

import ctypes
import os
import sys

SEAT = ctypes.CDLL("libseat.so.1")
SEAT.libseat_open_seat.restype = ctypes.c_void_p
Told = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class Listener(ctypes.Structure):
    """struct libseat_seat_listener: what libseat calls when the session comes to the front, and goes."""

    _fields_ = (("enable", Told), ("disable", Told))


def hold(node: str) -> None:
    """Open a node as soon as the session is in front; return when the seat is gone."""
    active: list[bool] = []

    def comes(_seat: int, _data: int) -> None:
        active.append(True)

    def goes(seat: int, _data: int) -> None:
        SEAT.libseat_disable_seat(ctypes.c_void_p(seat))

    listener = Listener(Told(comes), Told(goes))
    seat = ctypes.c_void_p(SEAT.libseat_open_seat(ctypes.byref(listener), None))
    if not seat:
        sys.exit("no seat")
    while not active:
        SEAT.libseat_dispatch(seat, 1000)
    fd = ctypes.c_int()
    if SEAT.libseat_open_device(seat, os.fsencode(node), ctypes.byref(fd)) < 0:
        sys.exit(f"{node} cannot be opened")
    while SEAT.libseat_dispatch(seat, -1) >= 0:
        pass


if __name__ == "__main__":
    hold(sys.argv[1])
