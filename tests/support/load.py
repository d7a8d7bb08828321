"""A paced producer as a process of its own: `python -m support.load '{"bootstrap": …, "topic": …, …}'`.

Produces until its standard input ends, every record to the next partition in turn, and then prints one line of JSON:
{"sent", "committed", "aborted"}. With `transactional` every record is in a transaction of some milliseconds,
every third one of which is aborted, the last one of each partition too: the topic ends on abort markers.
"""

import json
import sys
import threading
import time

from confluent_kafka import KafkaException, Producer

STEP_SECONDS = 0.01


def main():
    want = json.loads(sys.argv[1])
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    options = {"bootstrap.servers": want["bootstrap"], "acks": "all", "enable.idempotence": True, "linger.ms": 2}
    transactional = want.get("transactional")
    if transactional:
        options["transactional.id"] = transactional
        options["linger.ms"] = 0
    producer = Producer({**options, "log_level": 2})
    if transactional:
        producer.init_transactions(30)
    print("ready", flush=True)
    counts = {"sent": 0, "committed": 0, "aborted": 0}
    number, turn, began = 0, 0, time.monotonic()

    def send(count):
        nonlocal number
        for _ in range(count):
            value = json.dumps({"id": f"load {want['name']} {number % 5_000}", "n": number}).encode()
            while True:
                try:
                    producer.produce(want["topic"], value, partition=number % want["partitions"])
                    break
                except BufferError:
                    producer.poll(0.01)
            number += 1
        producer.poll(0)

    while not ended.wait(STEP_SECONDS):
        turn += 1
        # What is due by now, so that the rate holds although a transaction takes its time.
        due = min(round(want["rate"] * (time.monotonic() - began)) - number, want["rate"])
        if transactional:
            producer.begin_transaction()
            send(due)
            if turn % 3 == 0:
                # An abort drops what is still queued: these records are to be in the log.
                producer.flush(30)
                producer.abort_transaction(30)
                counts["aborted"] += due
            else:
                producer.commit_transaction(30)
                counts["committed"] += due
        else:
            send(due)
    if transactional:
        producer.begin_transaction()
        send(want["partitions"])
        producer.flush(30)
        producer.abort_transaction(30)
        counts["aborted"] += want["partitions"]
    if producer.flush(60):
        raise KafkaException("records undelivered")
    counts["sent"] = number
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
