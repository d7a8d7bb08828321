//! Kernels of the server's own: PTX text that the driver compiles, and its launches.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

use super::context::{Context, Stream};
use super::driver::Handle;
use super::vmm::{DeviceBytes, check_range, may_use, settle};
use crate::error::GdsError;

/// What `scatter.cu` compiles to, and the zero byte that ends a text.
const SCATTER_PTX: &str = concat!(include_str!("../kernels/scatter.ptx"), "\0");

/// Bytes of an entry of `pinion_scatter`.
pub(crate) const ENTRY_BYTES: usize = 16;

/// Threads of a block.
const THREADS: u32 = 128;

/// More would come back for what is left all the same.
const MAX_BLOCKS: u64 = 1024;

/// The kernel that writes many small stretches: loaded once for a context.
#[derive(Debug)]
pub(crate) struct ScatterKernel {
    module: Module,
    function: Handle,
}

// SAFETY: the function is a name within the module, which is kept; handles may be used from any
// thread.
unsafe impl Send for ScatterKernel {}
// SAFETY: as above.
unsafe impl Sync for ScatterKernel {}

#[derive(Debug)]
struct Module {
    context: Arc<Context>,
    handle: Handle,
}

impl ScatterKernel {
    /// Has the driver compile it: some milliseconds.
    ///
    /// # Errors
    ///
    /// `Driver`, of drivers too old for the text among others; nothing stays loaded.
    pub(crate) fn load(context: &Arc<Context>) -> Result<ScatterKernel, GdsError> {
        let mut handle = null_mut();
        let functions = context.enter()?;
        // SAFETY: a text that ends with a zero byte; the result is written to `handle`.
        let code =
            unsafe { (functions.module_load)(&raw mut handle, SCATTER_PTX.as_ptr().cast()) };
        context.check("cuModuleLoadData", code)?;
        let module = Module {
            context: context.clone(),
            handle,
        };
        let mut function = null_mut();
        // SAFETY: the module is loaded, the name ends with a zero byte, the result is written to
        // `function`.
        let code = unsafe {
            (functions.module_function)(
                &raw mut function,
                module.handle,
                c"pinion_scatter".as_ptr(),
            )
        };
        context.check("cuModuleGetFunction", code)?;
        Ok(ScatterKernel { module, function })
    }

    /// Writes the `count` entries at the start of `packed` to `target`, as `scatter.cu` says, after
    /// what is queued on the stream, and waits for that. What `packed` holds need not be trusted:
    /// the kernel leaves entries out that lie outside of either memory.
    ///
    /// # Errors
    ///
    /// `OutOfRange` and `ForeignRegion` before anything is queued, `Driver`.
    pub(crate) fn scatter(
        &self,
        packed: &Arc<dyn DeviceBytes>,
        count: u64,
        target: &Arc<dyn DeviceBytes>,
        stream: &Arc<Stream>,
    ) -> Result<(), GdsError> {
        may_use(packed.as_ref(), stream)?;
        may_use(target.as_ref(), stream)?;
        let entry_bytes = count.saturating_mul(ENTRY_BYTES as u64);
        check_range(packed.as_ref(), 0, entry_bytes)?;
        let context = stream.context();
        if !Arc::ptr_eq(context, &self.module.context) {
            return Err(GdsError::ForeignRegion {
                theirs: format!("{self:?}"),
                ours: format!("{stream:?}"),
            });
        }
        if count == 0 {
            return Ok(());
        }
        let functions = context.enter()?;
        let values = [
            packed.address(),
            packed.bytes(),
            count,
            target.address(),
            target.bytes(),
        ];
        let mut parameters: [*mut c_void; 5] =
            std::array::from_fn(|at| (&raw const values[at]).cast_mut().cast());
        // At most `MAX_BLOCKS`, which are 32 bits.
        let blocks = count.div_ceil(u64::from(THREADS)).min(MAX_BLOCKS) as u32;
        // SAFETY: the function takes five parameters of eight bytes, which are copied at the call.
        // The kernel reads `packed` and writes `target`, each within its length, and `settle`
        // keeps both until it is done; the module is kept by `self`, for which the caller waits
        // here.
        let code = unsafe {
            (functions.launch)(
                self.function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream.handle(),
                parameters.as_mut_ptr(),
                null_mut(),
            )
        };
        let queued = context.check("cuLaunchKernel", code);
        settle(stream, vec![packed.clone(), target.clone()], queued)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let functions = self.context.enter_to_give_back();
        // SAFETY: ours, and no launch of it runs: each was waited for. Should the driver have failed
        // at that, the context is broken and runs nothing.
        let code = unsafe { (functions.module_unload)(self.handle) };
        self.context.note("cuModuleUnload", code);
    }
}
