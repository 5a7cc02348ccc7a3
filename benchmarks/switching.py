"""Is a request lost while versions are switched, or an endpoint when a deployment is killed?

    python benchmarks/switching.py

A real Triton over a real S3 store serves small detectors whose answers are known bit by bit. 8 clients ask without a
pause and without trying again, while versions are deployed and rolled back; then while deployments in processes of
their own are killed (SIGKILL) at random moments spread over their work. After each kill the endpoint has to answer with
a whole version, every fourth time after a restart of Triton, and the next deployment has to succeed. Writes
`results/switching.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from common import write_result
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))

from softteacher.demo.servers import seaweedfs, triton
from softteacher.errors import UserError
from softteacher.serving.deploy import deploy, rollback
from tests.load import Killer, Models, ask, clients

NAME = "switched"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        store = stack.enter_context(seaweedfs(root / "s3"))
        os.environ.update(store.env)
        repository, models = store.create_bucket("models"), Models(root / "onnx")
        server = stack.enter_context(ExitStack())
        urls = server.enter_context(triton(repository, root / "triton"))

        def deploy_next() -> int:
            return int(deploy(models.next(repository, NAME)[1], repository, urls.http, NAME)["version"])

        deploy_next()
        with clients(urls.http, NAME, models, a.clients) as switched:
            for i in range(a.switches):  # two new ones, one back
                live = rollback(repository, urls.http, NAME)["version"] if i % 3 == 2 else deploy_next()
                print(f"switch {i + 1}: version {live}, {switched.requests} requests so far", flush=True)

        killer = Killer(repository, urls.http, NAME, models, a.seed)
        with clients(urls.http, NAME, models, a.clients):
            killer.measure()
        steps: Counter[str] = Counter()
        requests, failures, lost = 0, 0, 0
        for i in range(a.kills):
            with clients(urls.http, NAME, models, a.clients) as killed:
                step = killer.kill(i, a.kills)
            steps[step] += 1
            requests, failures = requests + killed.requests, failures + len(killed.failures)
            if i % 4 == 3:
                server.close()
                server.enter_context(triton(repository, root / "triton", load=["*"], at=urls))
            try:
                answered = ask(urls.http, NAME, models)
                live = deploy_next()
                outcome = f"version {answered} answers, version {live} deployed"
                if ask(urls.http, NAME, models) != live:
                    raise AssertionError(f"version {live} was deployed and doesn't answer")
            except (UserError, AssertionError) as e:
                lost, outcome = lost + 1, f"LOST: {e}"
            print(f"kill {i + 1}, {step}: {outcome}", flush=True)
            for failure in killed.failures[:3]:
                print(f"  {failure}", flush=True)

    table = Table("under load", "number", "requests", "failed")
    table.add_row("switches", str(a.switches), str(switched.requests), str(len(switched.failures)))
    table.add_row("killed deployments", str(a.kills), str(requests), str(failures))
    Console(width=100).print(table)
    print(f"lost after kills: {lost}; the kills came while {dict(steps)}")
    write_result(
        "switching",
        {
            "failed_requests_during_switches": len(switched.failures),
            "requests": switched.requests,
            "switches": a.switches,
            "clients": a.clients,
            "versions_that_answered": len(switched.versions),
            "kills": a.kills,
            "lost_after_kills": lost,
            "failed_requests_during_kills": failures,
            "requests_during_kills": requests,
            "kills_came_while": dict(steps),
        },
    )
    sys.exit(bool(switched.failures or failures or lost))


if __name__ == "__main__":
    main()
