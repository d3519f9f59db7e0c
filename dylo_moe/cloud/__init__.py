"""`dylora submit`: a training as a custom job of Vertex AI."""
