"""Brokers that ask who we are: TLS and SCRAM against a real Kafka.

The fears: options that librdkafka never gets, a certificate that is not checked, a wrong password that stops a source for
good, a changed secret that only a restart takes in.
"""

import json
import os
import socket
import subprocess

import pytest
from confluent_kafka.admin import (
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from support import flight as calls
from support.broker import Broker, Log
from support.ingest import wait_caught_up
from support.process import pinion_json
from support.wait import until

pytestmark = pytest.mark.kafka

STORE_PASSWORD = "only-for-tests"
DEFINITION = """
[table]
name = "clicks"
entity = [{{ name = "user", type = "string" }}]

[features]
dwell = "int64"

[source.kafka]
topic = "{topic}"

[source.kafka.options]
"security.protocol" = "SASL_SSL"
"sasl.mechanism" = "SCRAM-SHA-512"
"sasl.username" = "pinion"
"sasl.password" = "${{file:password}}"
"ssl.ca.location" = "{authority}"
"""


def certificate(folder, name):
    """A key store with a new key for 127.0.0.1, and its certificate as PEM, which is its own authority."""
    store, pem = folder / f"{name}.p12", folder / f"{name}.pem"
    keytool = ["keytool", "-keystore", store, "-storetype", "PKCS12", "-storepass", STORE_PASSWORD, "-alias", name]
    for arguments in (
        ["-genkeypair", "-keyalg", "RSA", "-dname", f"CN={name}", "-ext", "san=ip:127.0.0.1", "-validity", "2"],
        ["-exportcert", "-rfc", "-file", pem],
    ):
        subprocess.run([*keytool, *arguments], check=True, capture_output=True, timeout=60)
    return store, pem


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """(broker, its guarded address, PEM of its authority): a listener with TLS and SCRAM beside the plain one."""
    folder = tmp_path_factory.mktemp("guarded-kafka")
    store, authority = certificate(folder, "broker")
    broker = Broker(folder / "broker")
    broker._script("stop")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    properties = folder / "broker" / "server.properties"
    text = properties.read_text().replace("listeners=PLAINTEXT:", f"listeners=GUARDED://127.0.0.1:{port},PLAINTEXT:", 1)
    text = text.replace("protocol.map=", "protocol.map=GUARDED:SASL_SSL,", 1)
    text += f"""inter.broker.listener.name=PLAINTEXT
listener.name.guarded.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.guarded.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.guarded.ssl.keystore.type=PKCS12
listener.name.guarded.ssl.keystore.location={store}
listener.name.guarded.ssl.keystore.password={STORE_PASSWORD}
listener.name.guarded.ssl.key.password={STORE_PASSWORD}
"""
    properties.write_text(text)
    broker.start()
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    user = UserScramCredentialUpsertion(
        "pinion", ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096), b"open sesame", os.urandom(16)
    )
    for done in admin.alter_user_scram_credentials([user]).values():
        done.result(30)
    yield broker, f"127.0.0.1:{port}", authority
    broker.stop()


def reason_of(server):
    """Why the source does not run; None when it does."""
    (source,) = pinion_json("source", "list", "--server", server.flight)
    return source["reason"] if source["state"] == "degraded" else None


def fill(broker, topic):
    log = Log(broker.producer(), topic)
    for n in range(100):
        log.send(json.dumps({"user": f"u{n}", "dwell": n}).encode(), partition=0)
    log.flush()
    return log


def test_a_source_reads_over_tls_with_scram_once_its_password_is_right(store, guarded, serve):
    broker, address, authority = guarded
    topic = broker.topic("guarded", partitions=1)
    store.apply(DEFINITION.format(topic=topic, authority=authority))
    log = fill(broker, topic)
    secrets = store.folder / "secrets"
    secrets.mkdir()
    (secrets / "password").write_text("open barley\n")
    server = serve(brokers=address, env={"PINION__KAFKA__SECRETS_DIR": secrets})
    reason = until(lambda: reason_of(server), 30, "the wrong password being named")
    assert "authentication" in reason.lower(), reason
    client = calls.connect(server)
    assert calls.scan(client, "clicks").num_rows == 0
    # The next connection takes the password that is there by then.
    (secrets / "password").write_text("open sesame\n")
    wait_caught_up(server, client, "clicks", log)
    assert calls.scan(client, "clicks")["dwell"].to_pylist() == list(range(100))
    assert reason_of(server) is None
    told = json.dumps(pinion_json("describe", "clicks", "--server", server.flight)) + server.log_text(100_000)
    assert "open sesame" not in told and "open barley" not in told


def test_a_broker_whose_certificate_is_anothers_is_not_read(store, guarded, serve, tmp_path):
    broker, address, _ = guarded
    _, alien = certificate(tmp_path, "alien")
    topic = broker.topic("alien", partitions=1)
    store.apply(DEFINITION.format(topic=topic, authority=alien))
    fill(broker, topic)
    secrets = store.folder / "secrets"
    secrets.mkdir()
    (secrets / "password").write_text("open sesame\n")
    server = serve(brokers=address, env={"PINION__KAFKA__SECRETS_DIR": secrets})
    reason = until(lambda: reason_of(server), 30, "the certificate being named")
    assert "certificate" in reason.lower(), reason
    assert calls.scan(calls.connect(server), "clicks").num_rows == 0
