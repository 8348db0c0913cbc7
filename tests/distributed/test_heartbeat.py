"""Heartbeats of processes."""

import socket
import time

import torch.distributed as dist

from entropic_fast.distributed._heartbeat import Heartbeat


def test_a_process_without_new_heartbeats_is_missing_and_one_that_gives_them_is_not():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    first, second = Heartbeat(store, 0, timeout=0.5), Heartbeat(store, 1, timeout=0.5)
    assert first.missing([0, 1]) == []
    time.sleep(1.0)
    assert first.missing([0, 1]) == []
    assert first.finished([0, 1]) == []
    second.finish()
    assert first.finished([0, 1]) == [1]
    time.sleep(0.2)
    found = []
    until = time.monotonic() + 20
    while not found and time.monotonic() < until:
        time.sleep(0.1)
        found = first.missing([0, 1])
    assert found == [1]
    first.finish()
