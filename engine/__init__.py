"""murmur's engine: recurrent models on live signals, state carried from chunk to chunk.

The path of a chunk::

    client ─► server ─► loop ─► session ─► lane ─────────────────────────► loop ─► server ─► client,
              sockets   checks,  order,     filters, state rows, one model  messages          subscribers
                        limits   gaps, rate step for many streams, wing
                                            (beats, alerts, scores, audio)

``scheduler`` says which rows are stepped when; ``model_file`` holds all that is known of a model.
"""
