"""Checkpoints on disk: strict reading, the dense logical view, streaming atomic writing.

Every file is treated as written by an attacker: headers are validated before use, shard names may not leave
their folder, pickle is never loaded.

* ``safetensors_file.py``  one file: ``SafetensorsFile``
* ``reader.py``            one folder as stored: ``CheckpointReader``
* ``logical.py``           one folder as dense tensors: ``LogicalCheckpoint``, ``open_checkpoint``
* ``writer.py``            streaming output: ``SafetensorsWriter``, ``CheckpointWriter``, ``write_tensors``
* ``folder.py``            all or nothing: ``output_folder``, ``seal``
* ``hub.py``               model arguments: ``resolve_model``
"""
