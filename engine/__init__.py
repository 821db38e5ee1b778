"""murmur's engine: recurrent models on live signals, state carried from chunk to chunk.

The path of a chunk::

    client ─► server ─► loop ─► session ─► lane ──────► loop ─► server ─► client, subscribers
              sockets   checks  order      filters      results
                        limits  gaps       state rows   as messages
                                rate       one model step for many streams
                                           wing: beats, alerts, scores, audio

``scheduler`` says which rows are stepped when; ``model_file`` holds all that is known of a model.
"""
