//! AdamW on a GPU, and the global norm of its gradient; the maths stand in `ops/adamw.rs`.

use super::flat::{assert_vector, launch_values};
use super::{Buffer, Dtype, Gpu, Launch, Mat};
use crate::Result;
use crate::ops::adamw::{Rule, Update};

/// Blocks whose sums a norm adds up: as many on every GPU, so that it is the same everywhere.
const BLOCKS: u32 = 1024;
const THREADS: u32 = 256;
/// Values of an access.
const GROUP: usize = 4;
/// Bytes that [`norm`] needs beside the gradient.
pub(crate) const NORM_BYTES: usize = 8 * (BLOCKS as usize + 1);

/// Moves parameters (N) and moments (2, N) by one step.
pub(crate) fn step(gpu: &Gpu, parameters: Mat<'_>, moments: Mat<'_>, gradient: Mat<'_>, update: Update) -> Result<()> {
    let count = parameters.columns;
    assert_vector("adamw: parameters", parameters, count);
    assert_vector("adamw: gradient", gradient, count);
    assert!(moments.shape() == (2, count) && moments.dtype == Dtype::F32, "adamw: moments {moments:?} of {count}");
    step_values(gpu, parameters, moments.rows(0, 1), moments.rows(1, 1), gradient, &Rule::new(update))
}

pub(super) fn step_values(gpu: &Gpu, p: Mat<'_>, m: Mat<'_>, v: Mat<'_>, g: Mat<'_>, rule: &Rule) -> Result<()> {
    let count = p.columns;
    [p, m, v, g].into_iter().for_each(|mat| assert_vector("adamw", mat, count));
    let launch = launch_values(gpu, "adamw_step", count.div_ceil(GROUP))?.pointer(p).pointer(m).pointer(v).pointer(g);
    // SAFETY: each has so many values.
    unsafe { with_rule(launch.long(count as u64), rule).run() }
}

/// The next arguments: an update's constants.
pub(super) fn with_rule<'a>(launch: Launch<'a>, rule: &Rule) -> Launch<'a> {
    launch.float(rule.decay).float(rule.rate).float(rule.correction_2).float(rule.clip)
}

/// Euclidean norm of a gradient (N), once the GPU has come so far: finite exactly where each of its values is. `room` has
/// [`NORM_BYTES`].
///
/// # Errors
/// [`crate::Error::Device`] where something queued before has failed.
pub(crate) fn norm(gpu: &Gpu, gradient: Mat<'_>, room: &Buffer) -> Result<f64> {
    let count = gradient.columns;
    assert_vector("adamw: gradient", gradient, count);
    assert!(room.bytes() >= NORM_BYTES, "adamw: {} bytes for a norm", room.bytes());
    let (norm, partial) = (room.at(0), room.at(8));
    let sums = gpu.launch("squared_norm")?.grid(BLOCKS, THREADS).long(partial).pointer(gradient).long(count as u64);
    // SAFETY: the sizes were checked.
    unsafe { sums.run() }?;
    let finish = gpu.launch("squared_norm_finish")?.grid(1, 1024).long(norm).long(partial).int(BLOCKS as usize);
    // SAFETY: as above.
    unsafe { finish.run() }?;
    let mut value = [0f64];
    room.read(0, &mut value)?;
    Ok(value[0])
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Held, gpu, random};
    use super::*;
    use crate::ops::{adamw, host, tensor};

    #[test]
    fn steps_are_those_of_the_cpu_to_the_bit() {
        let Some(gpu) = gpu() else { return };
        for count in [2, 7, 4096, 100_003] {
            let (parameters, moments) = (random(1, count), vec![0f32; 2 * count]);
            let cpu_parameters = tensor(parameters.clone(), count).unwrap();
            let cpu_moments = tensor(moments.clone(), (2, count)).unwrap();
            let held = |values: &[f32], rows| Held::of(&gpu, values, (rows, count), count, Dtype::F32);
            let (on_gpu, gpu_moments) = (held(&parameters, 1), held(&moments, 2));
            for step in 1..4 {
                let gradient = random(u64::from(step) + 1, count);
                let update = Update { step, learning_rate: 1e-2, weight_decay: 0.1, clip_factor: 0.5 };
                adamw::step(&cpu_parameters, &cpu_moments, &tensor(gradient.clone(), count).unwrap(), update).unwrap();
                super::step(&gpu, on_gpu.mat(), gpu_moments.mat(), held(&gradient, 1).mat(), update).unwrap();
            }
            assert_eq!(on_gpu.values(), &*host(&cpu_parameters).unwrap());
            assert_eq!(gpu_moments.values(), &*host(&cpu_moments).unwrap());
        }
    }

    #[test]
    fn norms_are_those_of_the_cpu_and_show_what_is_no_number() {
        let Some(gpu) = gpu() else { return };
        let room = Buffer::new(&gpu, NORM_BYTES).unwrap();
        for count in [0, 1, 7, 100_003] {
            let mut gradient = random(1, count);
            let on_gpu = |gradient: &[f32]| {
                norm(&gpu, Held::of(&gpu, gradient, (1, count), count, Dtype::F32).mat(), &room).unwrap()
            };
            let expected = adamw::norm(&tensor(gradient.clone(), count).unwrap()).unwrap();
            assert!((on_gpu(&gradient) - expected).abs() <= 1e-12 * expected, "{count}");
            for place in [0, count / 2, count.saturating_sub(1)] {
                for wrong in [f32::NAN, f32::INFINITY] {
                    if let Some(value) = gradient.get_mut(place) {
                        let right = std::mem::replace(value, wrong);
                        assert!(!on_gpu(&gradient).is_finite());
                        gradient[place] = right;
                    }
                }
            }
        }
    }
}
