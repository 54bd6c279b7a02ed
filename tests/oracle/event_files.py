"""What TensorBoard reads in a folder of event files, as one JSON file.

    event_files.py FOLDER OUT.json
"""

import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main(folder, out):
    # 0 keeps all events of a kind.
    events = EventAccumulator(folder, size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    images = {tag: [[image.step, image.width, image.height] for image in events.Images(tag)] for tag in tags["images"]}
    pictures = {tag: events.Images(tag)[-1].encoded_image_string[:8].hex() for tag in tags["images"]}
    answer = {
        "scalars": {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in tags["scalars"]},
        "images": images,
        "pictures": pictures,
        "texts": {tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)] for tag in tags["tensors"]},
        "plugins": {tag: events.SummaryMetadata(tag).plugin_data.plugin_name for tag in tags["tensors"]},
    }
    with open(out, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
