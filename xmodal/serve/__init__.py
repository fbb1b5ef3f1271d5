"""A trained model as an HTTP server with a web page, see xmodal/serve/README.md."""
