//! Kernels of the server's own: PTX text that the driver compiles, and its launches.

use std::ffi::{CStr, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

use super::context::{Context, Stream};
use super::driver::Handle;
use super::vmm::{DeviceBytes, check_range, may_use, settle};
use crate::error::GdsError;

/// What `refresh.cu` compiles to, and the zero byte that ends a text.
const PTX: &str = concat!(include_str!("../kernels/refresh.ptx"), "\0");

/// Bytes of an entry of `pinion_scatter`, and of a buffer of `pinion_copy_rows`.
pub(crate) const ENTRY_BYTES: usize = 16;

/// Bytes of a row's number.
pub(crate) const ROW_BYTES: usize = 4;

/// Threads of a block.
const THREADS: u32 = 128;

/// More would come back for what is left all the same.
const MAX_BLOCKS: u64 = 1024;

/// The kernels by which pins are refreshed: loaded once for a context.
#[derive(Debug)]
pub(crate) struct RefreshModule {
    module: Module,
    scatter: Handle,
    copy_rows: Handle,
}

// SAFETY: the functions are names within the module, which is kept; handles may be used from any
// thread.
unsafe impl Send for RefreshModule {}
// SAFETY: as above.
unsafe impl Sync for RefreshModule {}

#[derive(Debug)]
struct Module {
    context: Arc<Context>,
    handle: Handle,
}

impl RefreshModule {
    /// Has the driver compile it: some milliseconds.
    ///
    /// # Errors
    ///
    /// `Driver`, of drivers too old for the text among others; nothing stays loaded.
    pub(crate) fn load(context: &Arc<Context>) -> Result<RefreshModule, GdsError> {
        let mut handle = null_mut();
        let functions = context.enter()?;
        // SAFETY: a text that ends with a zero byte; the result is written to `handle`.
        let code = unsafe { (functions.module_load)(&raw mut handle, PTX.as_ptr().cast()) };
        context.check("cuModuleLoadData", code)?;
        let module = Module {
            context: context.clone(),
            handle,
        };
        Ok(RefreshModule {
            scatter: module.function(c"pinion_scatter")?,
            copy_rows: module.function(c"pinion_copy_rows")?,
            module,
        })
    }

    /// Writes the `count` entries at the start of `packed` to `to`, after what is queued on the
    /// stream, and waits for that. What `packed` holds need not be trusted: the kernel leaves out
    /// what lies outside of either memory.
    ///
    /// # Errors
    ///
    /// `OutOfRange` and `ForeignRegion` before anything is queued, `Driver`.
    pub(crate) fn scatter(
        &self,
        packed: &Arc<dyn DeviceBytes>,
        count: u64,
        to: &Arc<dyn DeviceBytes>,
        stream: &Arc<Stream>,
    ) -> Result<(), GdsError> {
        check_range(packed.as_ref(), 0, count.saturating_mul(ENTRY_BYTES as u64))?;
        let values = [
            packed.address(),
            packed.bytes(),
            count,
            to.address(),
            to.bytes(),
        ];
        // SAFETY: `pinion_scatter` takes these five, reads `packed` and writes `to`, each within
        // its length, and the entries, which were found to lie in it.
        unsafe { self.launch(self.scatter, &values, count, &[packed, to], stream) }
    }

    /// Copies the rows and buffers that `packed` names, as `refresh.cu` says, after what is queued
    /// on the stream, and waits for that. What `packed` holds need not be trusted, as above.
    ///
    /// # Errors
    ///
    /// `OutOfRange` and `ForeignRegion` before anything is queued, `Driver`.
    pub(crate) fn copy_rows(
        &self,
        packed: &Arc<dyn DeviceBytes>,
        (buffers, rows): (u64, u64),
        from: &Arc<dyn DeviceBytes>,
        to: &Arc<dyn DeviceBytes>,
        stream: &Arc<Stream>,
    ) -> Result<(), GdsError> {
        let bytes = buffers
            .saturating_mul(ENTRY_BYTES as u64)
            .saturating_add(rows.saturating_mul(ROW_BYTES as u64));
        check_range(packed.as_ref(), 0, bytes)?;
        let values = [
            packed.address(),
            buffers,
            rows,
            from.address(),
            from.bytes(),
            to.address(),
            to.bytes(),
        ];
        let copies = buffers.saturating_mul(rows);
        // SAFETY: `pinion_copy_rows` takes these seven, reads `from` and writes `to`, each within
        // its length, and of `packed` the buffers and rows, which were found to lie in it.
        unsafe { self.launch(self.copy_rows, &values, copies, &[packed, from, to], stream) }
    }

    /// Launches a kernel of the module for `work` items, and waits for it.
    ///
    /// # Safety
    ///
    /// `function` is of this module and takes parameters of eight bytes, as many as there are
    /// values; with these it touches nothing but `memory`.
    unsafe fn launch<const N: usize>(
        &self,
        function: Handle,
        values: &[u64; N],
        work: u64,
        memory: &[&Arc<dyn DeviceBytes>],
        stream: &Arc<Stream>,
    ) -> Result<(), GdsError> {
        for memory in memory {
            may_use(memory.as_ref(), stream)?;
        }
        let context = stream.context();
        if !Arc::ptr_eq(context, &self.module.context) {
            return Err(GdsError::ForeignRegion {
                theirs: format!("{self:?}"),
                ours: format!("{stream:?}"),
            });
        }
        if work == 0 {
            return Ok(());
        }
        let functions = context.enter()?;
        let mut parameters: [*mut c_void; N] =
            std::array::from_fn(|at| (&raw const values[at]).cast_mut().cast());
        // At most `MAX_BLOCKS`, which are 32 bits.
        let blocks = work.div_ceil(u64::from(THREADS)).min(MAX_BLOCKS) as u32;
        // SAFETY: the parameters are what the function takes (the caller's word) and are copied at
        // the call. What it touches is kept by `settle` until it is done, and the module by `self`,
        // whose borrower waits here.
        let code = unsafe {
            (functions.launch)(
                function,
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
        let kept = memory.iter().map(|memory| Arc::clone(memory)).collect();
        settle(stream, kept, queued)
    }
}

impl Module {
    fn function(&self, name: &CStr) -> Result<Handle, GdsError> {
        let mut function = null_mut();
        let functions = self.context.enter()?;
        // SAFETY: the module is loaded, the name ends with a zero byte, the result is written to
        // `function`.
        let code =
            unsafe { (functions.module_function)(&raw mut function, self.handle, name.as_ptr()) };
        self.context.check("cuModuleGetFunction", code)?;
        Ok(function)
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
