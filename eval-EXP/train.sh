#!/bin/sh
# The training of derain_light.pt (runs 1 to 12, 15, 16 and 20 to 23) and of derain.pt (13, 14 and 17 to 19, after 12; for
# a GPU: on two CPU cores they take days), from the photographs on; interrupted, it goes on where it was. In the
# project's folder:
#
#     sh eval-EXP/train.sh BSDS500 RAIN800_TRAINING [FLAG ...]
#
# BSDS500: its folder of photographs, with train/, val/ and test/ inside, of which those of photographs.txt are taken;
# RAIN800_TRAINING: Rain800's side-by-side training pairs. Flags are added to each run's, and are to be given again
# to go on: `--workers 8`, `--device cuda`, or `--epochs 1 --steps_per_epoch 1` to see that all is in place.
set -eu
usage="sh eval-EXP/train.sh BSDS500 RAIN800_TRAINING [FLAG ...]"
bsds=${1:?$usage} rain800=${2:?$usage}
shift 2
added=$*
python=${PYTHON:-python}
made=datasets/derain

# Scenes of three densities over clean photographs: made SEED FOLDER PHOTOGRAPHS [FLAG ...]
scenes() {
    [ -d "$made/$2" ] && return
    rm -rf "$made/making" # of a run that was interrupted
    "$python" -m support.rain "$3" "$made/making" --seed "$1" ${4-}
    mv "$made/making" "$made/$2"
}

# One run, unless it is done: train NUMBER FLAG ...
train() {
    run=eval-EXP-derain-$1
    shift
    if [ -f "$run/summary.json" ]; then
        echo "$run is done"
    elif [ -f "$run/last.pt" ] || [ -f "$run/last.prev.pt" ]; then
        "$python" train_model_batch.py $added --resume "$run"
    else
        "$python" train_model_batch.py "$@" --save "$run"
    fi
}

# BSDS500 without the scenes of test sets; test/100007.jpg is called test_100007.jpg here.
if [ ! -d "$made/photographs" ]; then
    rm -rf "$made/copying"
    mkdir -p "$made/copying"
    while read -r name; do
        inside=${name%%_*}/${name#*_}
        for file in "$bsds/$name" "$bsds/$inside" "$bsds/images/$inside" "$bsds/data/images/$inside"; do
            if [ -f "$file" ]; then cp "$file" "$made/copying/$name"; fi
        done
    done < eval-EXP/photographs.txt
    count=$(ls "$made/copying" | wc -l)
    echo "photographs in $bsds: $count of $(wc -l < eval-EXP/photographs.txt)"
    [ "$count" -gt 0 ] || exit 2
    mv "$made/copying" "$made/photographs"
fi
bsds=$made/photographs
if [ ! -d "$made/rain800" ]; then # without the pairs whose backgrounds are in test sets
    rm -rf "$made/copying"
    mkdir -p "$made/copying"
    cp "$rain800"/*.jpg "$made/copying"
    for number in 12 13 52 81 150 166 181 185 237 261 305 376 458 460 514 516 521 534 557 559 565 570 575 633 640 \
        665 668 670 673 698; do
        rm -f "$made/copying/$number.jpg"
    done
    mv "$made/copying" "$made/rain800"
fi
scenes 0 bsds-0 "$bsds"
scenes 1 bsds-1 "$bsds"
scenes 4 bsds-4 "$bsds"
scenes 7 bsds-7 "$bsds" "--style mixed"
scenes 2 rain800-2 "$made/rain800" "--clean_side left"
scenes 3 rain800-3 "$made/rain800" "--clean_side left --style mixed"
scenes 5 rain800-5 "$made/rain800" "--clean_side left"

# From the eighth run on: Rain800's rain over other backgrounds, but that of the pairs that choose checkpoints, whose
# numbers these are; and again Rain800's pairs from 501 on, half of which rain darkens.
chosen_on=" 24 30 51 55 60 82 90 108 131 160 182 215 218 225 227 247 304 319 351 354 356 388 391 396 444 468 471 508 \
539 551 576 603 631 "
if [ ! -d "$made/rain800-late" ]; then
    rm -rf "$made/copying" "$made/rain800-lending"
    mkdir -p "$made/copying" "$made/rain800-lending"
    for pair in "$made"/rain800/*.jpg; do
        number=$(basename "$pair" .jpg)
        case $chosen_on in *" $number "*) ;; *) cp "$pair" "$made/rain800-lending" ;; esac
        if [ "$number" -gt 500 ]; then cp "$pair" "$made/copying"; fi
    done
    mv "$made/copying" "$made/rain800-late"
fi
lent="--rain_of $made/rain800-lending --rain_side left"
scenes 10 bsds-10 "$bsds" "$lent"
scenes 12 bsds-12 "$bsds" "$lent"
scenes 11 rain800-11 "$made/rain800" "--clean_side left $lent"
scenes 13 rain800-13 "$made/rain800" "--clean_side left $lent"
# For the twelfth: streaks that lean further than elsewhere.
scenes 15 bsds-15 "$bsds" "--style mixed --angle 75"
# From the sixteenth on: photographs at half size, whose textures are finer.
if [ ! -d "$made/photographs-half" ]; then
    rm -rf "$made/copying"
    mkdir -p "$made/copying"
    "$python" - "$bsds" "$made/copying" <<'END'
import sys, pathlib, cv2
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    image = cv2.imread(str(file))
    half = cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)
    cv2.imwrite(f"{sys.argv[2]}/{file.stem}.png", half)
END
    mv "$made/copying" "$made/photographs-half"
fi
scenes 16 bsds-16 "$made/photographs-half"
# For the eighteenth: rain that no run before has seen.
scenes 20 bsds-20 "$bsds"
scenes 26 bsds-26 "$made/photographs-half"
scenes 27 bsds-27 "$bsds" "--style mixed"
scenes 30 bsds-30 "$bsds" "$lent"
scenes 20 rain800-20 "$made/rain800" "--clean_side left"
# For the nineteenth likewise.
scenes 31 bsds-31 "$bsds"
scenes 38 bsds-38 "$bsds"
scenes 36 bsds-36 "$made/photographs-half"
scenes 37 bsds-37 "$bsds" "--style mixed --angle 75"
scenes 40 bsds-40 "$bsds" "$lent"
scenes 31 rain800-31 "$made/rain800" "--clean_side left"
# For the twentieth and twenty-first, of the light network.
scenes 41 bsds-41 "$bsds"
scenes 46 bsds-46 "$made/photographs-half"
scenes 47 bsds-47 "$bsds" "--style mixed --angle 75"
scenes 50 bsds-50 "$bsds" "$lent"
scenes 41 rain800-41 "$made/rain800" "--clean_side left"
# For the twenty-second likewise.
scenes 61 bsds-61 "$bsds"
scenes 66 bsds-66 "$made/photographs-half"
scenes 67 bsds-67 "$bsds" "--style mixed --angle 75"
scenes 60 bsds-60 "$bsds" "$lent"
scenes 61 rain800-61 "$made/rain800" "--clean_side left"
# For the twenty-third likewise.
scenes 71 bsds-71 "$bsds"
scenes 76 bsds-76 "$made/photographs-half"
scenes 77 bsds-77 "$bsds" "--style mixed --angle 75"
scenes 70 bsds-70 "$bsds" "$lent"
scenes 71 rain800-71 "$made/rain800" "--clean_side left"

# The flags of made folders, `of FOLDER ...`: the clean side is right but in Rain800's own pairs
of() {
    data= sides=
    for name; do
        data="$data $made/$name"
        case $name in rain800 | rain800-late) sides="$sides left" ;; *) sides="$sides right" ;; esac
    done
    echo "--data$data --clean_side$sides"
}
three=$(of bsds-0 bsds-1 rain800-2 rain800-3 rain800)
four=$(of bsds-0 bsds-1 bsds-4 bsds-7 rain800-2 rain800-3 rain800-5 rain800 rain800)
five=$(of bsds-0 bsds-1 bsds-7 rain800-2 rain800-3 rain800-5 rain800 rain800 rain800)
eight=$(of bsds-0 bsds-7 bsds-10 bsds-12 rain800-2 rain800-3 rain800-11 rain800-13 rain800 rain800 rain800 \
    rain800-late rain800-late)
nine=$(of bsds-0 bsds-1 bsds-7 bsds-10 rain800-2 rain800-3 rain800-5 rain800-11 rain800 rain800 rain800 \
    rain800-late rain800-late rain800-late)
twelve=$(of bsds-0 bsds-1 bsds-15 bsds-10 rain800-2 rain800-3 rain800-5 rain800-11 rain800 rain800 rain800 \
    rain800-late rain800-late rain800-late)
thirteen=$(of bsds-0 bsds-1 bsds-4 bsds-7 bsds-15 bsds-10 rain800-2 rain800-3 rain800-5 rain800-11 \
    rain800 rain800 rain800 rain800 rain800-late rain800-late rain800-late)
fourteen=$(of bsds-0 bsds-1 bsds-4 bsds-7 bsds-15 bsds-10 rain800-3 rain800-11 rain800 rain800 rain800 \
    rain800-late rain800-late)
sixteen=$(of bsds-0 bsds-1 bsds-15 bsds-10 bsds-16 bsds-16 rain800-2 rain800-3 rain800-5 rain800-11 \
    rain800 rain800 rain800 rain800-late rain800-late rain800-late)
seventeen=$(of bsds-0 bsds-1 bsds-4 bsds-7 bsds-15 bsds-10 bsds-16 rain800-2 rain800-3 rain800-11 \
    rain800 rain800 rain800 rain800-late rain800-late)
eighteen=$(of bsds-20 bsds-26 bsds-27 bsds-30 rain800-20 rain800 rain800-late)
nineteen=$(of bsds-31 bsds-36 bsds-37 bsds-38 bsds-40 rain800-31 rain800 rain800-late)
twenty=$(of bsds-41 bsds-46 bsds-47 bsds-50 rain800-41 rain800 rain800 rain800-late)
twentytwo=$(of bsds-61 bsds-66 bsds-67 bsds-60 rain800-61 rain800 rain800 rain800-late)
twentythree=$(of bsds-71 bsds-76 bsds-77 bsds-70 rain800-71 rain800 rain800 rain800-late)
few="--val_scenes 12 --steps_per_epoch 200 --warmup_steps 100 --clean_inputs 0.1"
many="--val_scenes 24 --steps_per_epoch 500 --warmup_steps 100 --ema 0.999 --learning_rate 6e-4 --learning_rate_min 2e-6"
fine="--freeze_start 1 --internal_start 1 --batch_size 2 --patch_size 96"

train 1 $three $few --arch half_width_mixed_rain --channels 16 32 64 128 --residual --batch_size 4 --epochs 9 \
    --ema 0.999 --learning_rate_min 1e-5 "$@"
train 2 $three $few --weights eval-EXP-derain-1/best_loss.pt $fine --epochs 10 \
    --ema 0.998 --learning_rate 7e-4 --learning_rate_min 1e-5 "$@"
train 3 $three $few --weights eval-EXP-derain-2/best_psnr.pt $fine --mse_weight 20 --epochs 13 \
    --ema 0.998 --learning_rate 6e-4 --learning_rate_min 5e-6 --warmup_steps 50 --seed 1 "$@"
train 4 $four $many --weights eval-EXP-derain-3/best_psnr.pt $fine --mse_weight 20 --epochs 20 \
    --clean_inputs 0.1 --seed 4 "$@"
train 5 $five $many --weights eval-EXP-derain-4/best_psnr.pt $fine --mse_weight 20 --epochs 12 \
    --clean_inputs 0.25 --seed 5 "$@"
train 6 $five $many --weights eval-EXP-derain-5/best_psnr.pt $fine --mse_weight 20 --epochs 17 \
    --clean_inputs 0.25 --patch_size 128 --learning_rate 7e-4 --amp --seed 6 "$@"
train 7 $five $many --weights eval-EXP-derain-6/best_psnr.pt $fine --mse_weight 20 --epochs 17 \
    --clean_inputs 0.3 --patch_size 128 --learning_rate 7e-4 --amp --seed 7 "$@"
train 8 $eight $many --val_scenes 26 --weights eval-EXP-derain-7/best_psnr.pt $fine --mse_weight 20 --epochs 17 \
    --clean_inputs 0.25 --patch_size 128 --learning_rate 8e-4 --amp --seed 8 "$@"
train 9 $nine $many --val_scenes 28 --weights eval-EXP-derain-8/best_psnr.pt $fine --mse_weight 20 --epochs 20 \
    --clean_inputs 0.35 --patch_size 128 --learning_rate 8e-4 --amp --seed 9 "$@"
upright="--val_scenes 28 --clean_inputs 0.35 --patch_size 128 --upright"
train 10 $nine $many $fine $upright --weights eval-EXP-derain-9/best_psnr.pt --mse_weight 20 --epochs 2 \
    --steps_per_epoch 300 --warmup_steps 50 --ema 0.99 --learning_rate 4e-4 --seed 10 "$@"
train 11 $nine $many $fine $upright --weights eval-EXP-derain-10/best_psnr.pt --mse_weight 20 --epochs 6 \
    --steps_per_epoch 400 --seed 11 "$@"
train 12 $twelve $many $fine $upright --weights eval-EXP-derain-11/best_psnr.pt --mse_weight 0 \
    --psnr_weight 0.008 --epochs 7 --steps_per_epoch 400 --learning_rate 5e-4 --seed 12 "$@"
train 13 $thirteen $many $fine $upright --weights eval-EXP-derain-12/best_psnr.pt --channels 32 64 128 256 \
    --batch_size 16 --val_scenes 34 --clean_inputs 0.3 --mse_weight 10 --psnr_weight 0.006 --epochs 1 \
    --steps_per_epoch 1058 --warmup_steps 200 --learning_rate 8e-4 --amp --seed 13 "$@"
train 14 $fourteen $many $fine $upright --weights eval-EXP-derain-13/best_psnr.pt --batch_size 16 --val_scenes 34 \
    --mse_weight 10 --psnr_weight 0.006 --epochs 3 --steps_per_epoch 2330 --warmup_steps 200 \
    --learning_rate 8e-4 --amp --seed 14 "$@"
train 15 $twelve $many $fine $upright --weights eval-EXP-derain-12/best_psnr.pt --mse_weight 10 \
    --psnr_weight 0.006 --epochs 9 --steps_per_epoch 413 --learning_rate 5e-4 --seed 13 "$@"
train 16 $sixteen $many $fine $upright --weights eval-EXP-derain-15/best_psnr.pt --val_scenes 32 --clean_inputs 0.6 \
    --mse_weight 10 --psnr_weight 0.006 --epochs 1 --steps_per_epoch 2744 --warmup_steps 50 --learning_rate 4e-4 \
    --seed 17 "$@"

train 17 $seventeen $many $fine $upright --weights eval-EXP-derain-14/best_psnr.pt --batch_size 16 --val_scenes 34 \
    --mse_weight 10 --psnr_weight 0.006 --epochs 3 --steps_per_epoch 3005 --warmup_steps 200 \
    --learning_rate 7e-4 --amp --seed 18 "$@"
train 18 $eighteen $many $fine $upright --weights eval-EXP-derain-17/best_psnr.pt --batch_size 16 --val_scenes 24 \
    --mse_weight 10 --psnr_weight 0.006 --epochs 1 --steps_per_epoch 6002 --warmup_steps 200 \
    --learning_rate 7e-4 --amp --seed 19 "$@"
train 19 $nineteen $many $fine $upright --weights eval-EXP-derain-18/best_psnr.pt --batch_size 16 --val_scenes 24 \
    --clean_inputs 0.3 --mse_weight 10 --psnr_weight 0.006 --epochs 1 --steps_per_epoch 9461 --warmup_steps 200 \
    --learning_rate 7e-4 --amp --seed 22 "$@"
train 20 $twenty $many $fine $upright --weights eval-EXP-derain-16/best_psnr.pt --clean_inputs 0.5 \
    --mse_weight 10 --psnr_weight 0.006 --epochs 12 --steps_per_epoch 491 --amp --seed 23 "$@"
train 21 $twenty $many $fine $upright --weights eval-EXP-derain-20/best_psnr.pt --clean_inputs 0.7 \
    --mse_weight 10 --psnr_weight 0.006 --epochs 10 --steps_per_epoch 474 --learning_rate 4e-4 --amp --seed 25 "$@"
train 22 $twentytwo $many $fine $upright --weights eval-EXP-derain-21/best_psnr.pt --clean_inputs 0.6 \
    --mse_weight 10 --psnr_weight 0.006 --epochs 12 --steps_per_epoch 471 --learning_rate 5e-4 --amp --seed 26 "$@"
train 23 $twentythree $many $fine $upright --weights eval-EXP-derain-22/best_psnr.pt --clean_inputs 0.6 \
    --mse_weight 10 --psnr_weight 0.006 --epochs 15 --steps_per_epoch 487 --learning_rate 5e-4 --amp --seed 27 "$@"

"$python" model_train.py eval-EXP-derain-23/best_psnr.pt eval-EXP-derain-23/derain_light.pt
"$python" model_train.py eval-EXP-derain-19/best_psnr.pt eval-EXP-derain-19/derain.pt
