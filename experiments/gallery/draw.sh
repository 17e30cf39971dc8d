#!/usr/bin/env bash
# Draws the sheets of this folder, each by the command that is printed before it:
#     bash experiments/gallery/draw.sh quickstart/bundle runs
set -euo pipefail
bundle=$1 runs=$2 here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python - "$work" <<'END'
import sys
import numpy as np
from unclip_jax import pictures
from unclip_jax.data.emoji_scenes import Scene, render

for name, colour in (("fox", "blue"), ("pizza", "yellow"), ("castle", "green"), ("house", "blue")):
    pictures.save_png(f"{sys.argv[1]}/{name}.png", render(Scene(name, colour), 256))
mask = np.zeros((256, 256, 3), np.uint8)
mask[18:-18, 18:-18] = 255
pictures.save_png(f"{sys.argv[1]}/middle.png", mask)
sketch = np.full((256, 256, 3), (125, 30, 160), np.uint8)
y, x = np.mgrid[:256, :256]
sketch[(x - 128) ** 2 + (y - 138) ** 2 < 80**2] = (205, 30, 45)
sketch[20:70, 120:140] = (45, 160, 75)
pictures.save_png(f"{sys.argv[1]}/sketch.png", sketch)
END

cascade() { # FOLDER DECODER [NOISED_CLIP]: GLIDE's decoder with unCLIP's upsamplers
  rm -rf "$1" && mkdir "$1"
  cp -r "$2" "$1/decoder"
  cp -r "$bundle/upsampler_256" "$bundle/upsampler_1024" "$1"
  if [[ -n ${3-} ]]; then cp -r "$3" "$1/noised_clip"; fi
}
cascade "$runs/cascade_glide" "$runs/glide/bundle" "$runs/clip_noised/bundle"
cascade "$runs/cascade_glide_inpaint" "$runs/glide_inpaint/bundle"

sheet() { # NAME COMMAND …: a sheet of edit or sample
  local name=$1 module=$2
  shift 2
  echo "python -m unclip_jax.$module $*"
  python -m "unclip_jax.$module" "$@" --out "$work/$name" >"$work/log"
  local drawn=sheet
  if [[ $module == sample ]]; then drawn=grid; fi
  python -c "from PIL import Image; Image.open('$work/$name/$drawn.png').reduce(2).save('$here/$name.png')"
}

sheet variations edit variations --bundle "$bundle" --image "$work/fox.png" -n 8 --eta 1
sheet reproduction edit variations --bundle "$bundle" --image "$work/fox.png" -n 2 --eta 0
sheet interpolate edit interpolate --bundle "$bundle" --image "$work/pizza.png" --image "$work/castle.png" -n 8
sheet text_diff edit text_diff --bundle "$bundle" --image "$work/house.png" -n 8 --theta 0.5 \
  --before "a house on a blue background" --after "a house on a red background"
sheet reconstruct edit reconstruct --bundle "$bundle" --image "$work/castle.png" --pca "$runs/prior_ar/bundle" \
  --components 1 --components 2 --components 4 --components 8 --components 12 --components 16 --components 20 --components 24
sheet inpaint edit inpaint --bundle "$runs/cascade_glide_inpaint" --image "$work/fox.png" --mask "$work/middle.png" \
  --prompt "a red apple on a blue background" -n 4
sheet inpaint_implicit edit inpaint --bundle "$bundle" --image "$work/fox.png" --mask "$work/middle.png" \
  --prompt "a red apple on a blue background" -n 4
sheet sdedit edit sdedit --bundle "$bundle" --image "$work/sketch.png" --start 0.6 \
  --prompt "a red apple on a purple background" -n 8
sheet classify edit classify --bundle "$bundle" --image "$work/castle.png" --label "a castle" --label "a house" --label "a tent"
sheet clip_guidance sample --bundle "$runs/cascade_glide" --prompt "a castle on a pink background" -n 8 --guidance 1 \
  --clip-guidance 4
sheet rerank sample --bundle "$bundle" --prompt "a castle on a pink background" -n 4 --rerank 16
