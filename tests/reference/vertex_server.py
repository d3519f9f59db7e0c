"""Stand-ins on this machine: the call of Vertex AI that makes a job, over real gRPC, and Secret Manager over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import grpc
from google.cloud import aiplatform_v1
from google.cloud.aiplatform_v1 import JobServiceClient
from google.cloud.aiplatform_v1.services.job_service.transports import JobServiceGrpcTransport

CREATE = "/google.cloud.aiplatform.v1.JobService/CreateCustomJob"
JOB_NAME = "projects/123/locations/europe-west4/customJobs/456"


class StandInService:
    """Answers with a job that has a name, or with an error.

    Args:
        error: status and text, or None.
    """

    def __init__(self, error: tuple[grpc.StatusCode, str] | None = None) -> None:
        self.error = error
        self.requests: list[aiplatform_v1.CreateCustomJobRequest] = []
        self.endpoints: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve, on a free port, while the block runs."""
        server = grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers([self])  # type: ignore[list-item]
        self.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield
        finally:
            server.stop(None).wait()

    def client(self, *, client_options: dict[str, str]) -> JobServiceClient:
        """In the place of `JobServiceClient`: the real one, on a channel to this server."""
        self.endpoints.append(client_options["api_endpoint"])
        channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        return JobServiceClient(transport=JobServiceGrpcTransport(channel=channel))

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        """What gRPC asks for a handler of a call."""
        if call.method != CREATE:
            return None
        return grpc.unary_unary_rpc_method_handler(
            self._create,
            request_deserializer=aiplatform_v1.CreateCustomJobRequest.deserialize,
            response_serializer=aiplatform_v1.CustomJob.serialize,
        )

    def _create(self, request: aiplatform_v1.CreateCustomJobRequest, context: Any) -> aiplatform_v1.CustomJob:
        self.requests.append(request)
        if self.error is not None:
            context.abort(*self.error)
        answer = aiplatform_v1.CustomJob(request.custom_job)
        answer.name = JOB_NAME
        return answer


@contextmanager
def secret_manager(values: dict[str, str]) -> Iterator[str]:
    """Secret Manager's address, for secrets by their names.

    Args:
        values: a number is answered as a status, all else as the secret's value.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = values.get(self.path.removeprefix("/v1/").removesuffix(":access"), "404")
            status = int(value) if value.isdigit() else 200
            self.send_response(status)
            self.end_headers()
            data = base64.b64encode(value.encode()).decode()
            self.wfile.write(json.dumps({"payload": {"data": data}} if status == 200 else {}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=lambda: server.serve_forever(0.01), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
