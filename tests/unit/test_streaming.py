import threading
import time

import numpy as np
import pytest
import torch

from tda.streaming import AHEAD, BUFFERS, AbandonedError, HostBuffers, in_background, to_device
from tests.processes import wait_until

CPU = torch.device("cpu")


def test_items_are_consumed_in_order_in_another_thread():
    seen = []

    def consume(items):
        seen.append(threading.current_thread())
        return list(items)

    assert in_background(consume, range(20)) == list(range(20))
    assert seen != [threading.current_thread()]


def test_the_maker_goes_on_while_one_is_consumed_but_not_far():
    made, most_ahead = [], []

    def items():
        for number in range(8):
            made.append(number)
            yield number

    def consume(arriving):
        for number in arriving:
            wait_until(lambda number=number: len(made) > min(number + 1, 7))
            time.sleep(0.01)
            most_ahead.append(len(made) - number - 1)

    in_background(consume, items())
    assert 1 <= max(most_ahead) <= AHEAD + 1 == BUFFERS - 1


def test_an_error_of_the_consumer_ends_the_maker():
    made = []

    def items():
        for number in range(1000):
            made.append(number)
            yield number

    def consume(arriving):
        next(arriving)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        in_background(consume, items())
    assert len(made) < 10


def test_an_error_of_the_maker_reaches_the_consumer_as_the_lack_of_the_rest():
    met = []

    def items():
        yield 1
        raise ValueError("a document cannot be read")

    def consume(arriving):
        try:
            return list(arriving)
        except AbandonedError as error:
            met.append(error)
            raise

    with pytest.raises(ValueError, match="a document cannot be read"):
        in_background(consume, items())
    assert len(met) == 1
    assert "writer" not in {thread.name for thread in threading.enumerate()}


def test_a_ring_of_buffers_keeps_what_is_still_being_written():
    buffers = HostBuffers(3, 2, device=CPU)
    arriving = [buffers.fetch(torch.full((1 + number, 2), float(number))) for number in range(BUFFERS)]
    for number, one in enumerate(arriving):
        np.testing.assert_array_equal(one.wait(), np.full((1 + number, 2), number))
    buffers.fetch(torch.full((1, 2), 9.0))
    assert arriving[0].wait()[0, 0] == 9  # the first is filled again, and no other
    assert arriving[1].wait()[0, 0] == 1


def test_a_fetch_is_one_copy_of_what_it_fetches():
    copied = []

    def counting(target, source):
        copied.append(source.nbytes)
        target.copy_(source)

    buffers = HostBuffers(4, 5, device=CPU, copy=counting)
    buffers.fetch(torch.ones(3, 5))
    assert copied == [3 * 5 * 4]


def test_values_that_are_on_the_device_are_not_copied():
    values = torch.arange(3)
    assert to_device(values, CPU) is values
    copied = []
    on_meta = to_device(values, torch.device("meta"), copy=lambda target, source: copied.append(source.nbytes))
    assert on_meta.device.type == "meta"
    assert copied == [3 * 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_a_gpu_are_not_waited_for():
    device = torch.device("cuda")
    buffers = HostBuffers(64, 64, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        arriving = buffers.fetch(to_device(torch.ones(64, 64), device) * 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (arriving.wait() == 2).all()
