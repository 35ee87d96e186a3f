"""The room excludes: nobody computes while another measures, nobody starves, and a killed process leaves it open."""

import json

import pytest
from processes import finish, start

from ablations.experiment.room import Room


def test_the_room_costs_nothing_to_a_single_process_and_cannot_be_nested(tmp_path):
    room = Room(tmp_path)
    with room.busy(), pytest.raises(RuntimeError, match="nested"), room.quiet():
        pass
    with room.quiet(), pytest.raises(RuntimeError, match="nested"), room.busy():
        pass
    with pytest.raises(KeyError), room.busy():
        raise KeyError
    with room.quiet():
        pass
    room.close()
    with pytest.raises(RuntimeError, match="closed"), room.busy():
        pass


STEPPER = """
import sys, time
from ablations.experiment.room import Room
room = Room(sys.argv[1])
spans = []
print("ready", flush=True)
end = time.monotonic() + 1.2
while time.monotonic() < end:
    with room.busy():
        start = time.monotonic()
        time.sleep(0.004)
        spans.append((start, time.monotonic()))
print(spans)
"""

MEASURER = """
import sys, time
from ablations.experiment.room import Room
room = Room(sys.argv[1])
spans = []
print("ready", flush=True)
end = time.monotonic() + 1.2
while time.monotonic() < end:
    with room.quiet():
        start = time.monotonic()
        time.sleep(0.01)
        spans.append((start, time.monotonic()))
    time.sleep(0.02)
print(spans)
"""


def test_quiet_excludes_every_step_and_is_not_starved(tmp_path):
    processes = [start(STEPPER, tmp_path) for _ in range(4)] + [start(MEASURER, tmp_path) for _ in range(2)]
    spans = [json.loads(out.splitlines()[1].replace("(", "[").replace(")", "]")) for out in finish(processes)]
    steps = [span for process in spans[:4] for span in process]
    measured = spans[4] + spans[5]
    # Without the turnstile four steppers, each leaving the room for microseconds only, let no measuring process in.
    assert len(spans[4]) >= 3 and len(spans[5]) >= 3
    assert all(len(process) >= 3 for process in spans[:4])
    overlap = [(a, b) for i, a in enumerate(measured) for b in steps + measured[:i] if a[0] < b[1] and b[0] < a[1]]
    assert overlap == []
    shared = sum(a[0] < b[1] and b[0] < a[1] for a in spans[0] for b in spans[1])
    assert shared > 0, "steps of two processes must be allowed to run at the same time"


def test_a_killed_measurer_opens_the_room(tmp_path):
    script = """
import sys, time
from ablations.experiment.room import Room
room = Room(sys.argv[1])
with room.quiet():
    print("quiet", flush=True)
    time.sleep(60)
"""
    process = start(script, tmp_path)
    assert process.stdout.readline() == "quiet\n"
    process.kill()
    process.communicate()
    script = "import sys\nfrom ablations.experiment.room import Room\nwith Room(sys.argv[1]).busy(): pass"
    finish([start(script, tmp_path)])
