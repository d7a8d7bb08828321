//! Three ways to lose bytes under a running copy, each written with a public binding's safe
//! functions over the fake driver, where it does lose them, and beside it the same with ours.
//!
//! All three are one class of bug: a copy that runs on does not own what it reads. With our types
//! the lines that do the harm have no counterpart (see `misuse`); what is left is harmless.

#[path = "support/fake.rs"]
mod fake;

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, PinnedHostSlice};
use fake::Fake;
use pinion_gds::{Device, DeviceRange, PinnedPool, PoolLimits, Stretch, WorkStream};

const BYTES: usize = 1 << 20;
/// How late copies are: long enough to do harm in.
const LATE_MICROS: u64 = 50_000;

const WHOLE: Stretch = Stretch {
    host_offset: 0,
    device_offset: 0,
    bytes: BYTES,
};

/// A device by the binding: page-locked memory full of ones, and device memory to copy it to.
struct Naive {
    context: Arc<CudaContext>,
    staging: PinnedHostSlice<u8>,
    on_device: CudaSlice<u8>,
}

impl Naive {
    fn new() -> Naive {
        let context = CudaContext::new(0).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: it is filled before it is read.
        let mut staging = unsafe { context.alloc_pinned::<u8>(BYTES) }.unwrap();
        staging.as_mut_slice().unwrap().fill(1);
        let on_device = context.default_stream().alloc_zeros::<u8>(BYTES).unwrap();
        context.default_stream().synchronize().unwrap();
        Naive {
            context,
            staging,
            on_device,
        }
    }

    fn arrived(&self, stream: &Arc<CudaStream>) -> Vec<u8> {
        stream.clone_dtoh(&self.on_device).unwrap()
    }
}

/// The same by our types.
struct Ours {
    pool: PinnedPool,
    stream: WorkStream,
    on_device: DeviceRange,
}

impl Ours {
    fn new(device: &Device) -> Ours {
        Ours {
            pool: PinnedPool::new(device, PoolLimits::default()),
            stream: device.stream().unwrap(),
            on_device: DeviceRange::new(device, BYTES as u64).unwrap(),
        }
    }

    fn arrived(&self) -> Vec<u8> {
        let block = self.pool.take(BYTES).unwrap();
        let transfer = block.copy_from(&[WHOLE], &self.on_device, &self.stream);
        transfer.unwrap().wait().unwrap().to_vec()
    }
}

#[test]
fn a_future_that_is_dropped_frees_what_its_copy_still_reads() {
    /// What bindings call a future: it owns the source of a copy that was started.
    struct Copying {
        _source: PinnedHostSlice<u8>,
    }
    let fake = Fake::start();
    let naive = Naive::new();
    let Naive {
        context,
        staging,
        mut on_device,
    } = naive;
    fake.delay(LATE_MICROS, LATE_MICROS, 1);
    let stream = context.default_stream();
    stream.memcpy_htod(&staging, &mut on_device).unwrap();
    let future = Copying { _source: staging };
    drop(future); // a `select!` that took another branch, an early return
    let violations = fake.violations();
    assert!(violations.contains("cuMemFreeHost"), "{violations}");
    drop((on_device, stream, context));

    fake.reset();
    fake.be_strict();
    let device = fake.device();
    let ours = Ours::new(&device);
    fake.delay(LATE_MICROS, LATE_MICROS, 1);
    let mut block = ours.pool.take(BYTES).unwrap();
    block.fill(1);
    let transfer = block.copy_to(&[WHOLE], &ours.on_device, &ours.stream);
    drop(transfer.unwrap());
    ours.pool.free_all_blocks();
    assert!(ours.arrived().iter().all(|byte| *byte == 1));
    drop((ours, device));
    fake.assert_clean("a dropped transfer");
}

#[test]
fn a_buffer_reused_on_the_default_stream_changes_under_its_copy() {
    let fake = Fake::start();
    let mut naive = Naive::new();
    let stream = naive.context.default_stream();
    fake.delay(LATE_MICROS, LATE_MICROS, 1);
    stream
        .memcpy_htod(&naive.staging, &mut naive.on_device)
        .unwrap();
    // Said to wait for the copy; on the default stream it does not.
    naive.staging.as_mut_slice().unwrap().fill(2);
    stream.synchronize().unwrap();
    assert_eq!(
        naive.arrived(&stream)[BYTES - 1],
        2,
        "the copy took the next batch's bytes"
    );
    drop((naive, stream));

    the_next_batch_waits_for_the_copy(&fake);
}

#[test]
fn a_plain_slice_of_page_locked_memory_changes_under_its_copy() {
    let fake = Fake::start();
    let mut naive = Naive::new();
    let stream = naive.context.new_stream().unwrap();
    fake.delay(LATE_MICROS, LATE_MICROS, 1);
    let slice: &[u8] = naive.staging.as_slice().unwrap();
    stream.memcpy_htod(slice, &mut naive.on_device).unwrap();
    // The borrow ended with the call, the copy did not.
    naive.staging.as_mut_slice().unwrap().fill(2);
    stream.synchronize().unwrap();
    assert_eq!(
        naive.arrived(&stream)[BYTES - 1],
        2,
        "the copy took the next batch's bytes"
    );
    drop((naive, stream));

    the_next_batch_waits_for_the_copy(&fake);
}

/// With ours, the only way back to the block's bytes is through the wait.
fn the_next_batch_waits_for_the_copy(fake: &Fake) {
    fake.reset();
    fake.be_strict();
    let device = fake.device();
    let ours = Ours::new(&device);
    fake.delay(LATE_MICROS, LATE_MICROS, 1);
    let mut block = ours.pool.take(BYTES).unwrap();
    block.fill(1);
    let transfer = block.copy_to(&[WHOLE], &ours.on_device, &ours.stream);
    let mut block = transfer.unwrap().wait().unwrap();
    block.fill(2);
    assert!(ours.arrived().iter().all(|byte| *byte == 1));
    drop((block, ours, device));
    fake.assert_clean("a block that is refilled");
}
