"""From a trained detector to an endpoint, and the client of it."""

from softteacher.serving.client import Client as Client
