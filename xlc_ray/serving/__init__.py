"""Activations over HTTP: the routes of crosslayer-coding's server, and files of our own stores.

places.py   ids and names → places below one folder      slices.py   rows of a chunk file → a stream of bytes
uploads.py  request bodies → files, put in place whole   app.py      the routes      server.py   uvicorn around them
"""
