//! A device's primary context, and what lives in it: streams and events.
//!
//! A context is current per thread, so everything that calls the driver [enters] its context
//! first. Streams and events keep their context, and the context its driver, until they are gone.
//!
//! [enters]: Context::enter

use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::abi::code;
use super::driver::{Driver, Functions, Handle};
use crate::error::GdsError;

/// `CU_STREAM_NON_BLOCKING`: no implicit order with the default stream.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const WITHOUT_TIME: u32 = 2;
/// `CU_EVENT_BLOCKING_SYNC`: waiting threads sleep.
const SLEEPING: u32 = 1;

/// The retained primary context of one device.
#[derive(Debug)]
pub(crate) struct Context {
    driver: Arc<Driver>,
    device: i32,
    handle: Handle,
    /// Bytes given up because the driver could not say that nothing uses them any more.
    leaked_bytes: AtomicU64,
}

// SAFETY: the driver's functions may be called from any thread; a context handle is an opaque
// name that is made current per thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of the device with this number.
    pub(crate) fn retain(driver: &Arc<Driver>, ordinal: u32) -> Result<Arc<Context>, GdsError> {
        let mut device = 0;
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        // SAFETY: the result is written to `device`, which outlives the call.
        let found = unsafe { (driver.functions.device_get)(&raw mut device, number) };
        driver.check("cuDeviceGet", found)?;
        let mut handle = null_mut();
        // SAFETY: the device is the driver's own, the result is written to `handle`.
        let retained = unsafe { (driver.functions.context_retain)(&raw mut handle, device) };
        driver.check("cuDevicePrimaryCtxRetain", retained)?;
        Ok(Arc::new(Context {
            driver: driver.clone(),
            device,
            handle,
            leaked_bytes: AtomicU64::new(0),
        }))
    }

    /// Makes the context this thread's current one, for the calls that follow.
    pub(super) fn enter(&self) -> Result<&Functions, GdsError> {
        let functions = &self.driver.functions;
        // SAFETY: the context is retained until `self` is dropped.
        let code = unsafe { (functions.context_set_current)(self.handle) };
        self.check("cuCtxSetCurrent", code)?;
        Ok(functions)
    }

    /// The same where something must be given back whatever happens: tried twice; a call without
    /// the right context then says so itself.
    pub(super) fn enter_to_give_back(&self) -> &Functions {
        if let Err(error) = self.enter().or_else(|_| self.enter()) {
            tracing::warn!(%error, "the context could not be entered to give something back");
        }
        &self.driver.functions
    }

    pub(super) fn check(&self, call: &'static str, code: i32) -> Result<(), GdsError> {
        self.driver.check(call, code)
    }

    /// Notes that giving something back failed: nothing can be done about it.
    pub(super) fn note(&self, call: &'static str, code: i32) {
        if let Err(error) = self.check(call, code) {
            tracing::warn!(%error, "giving back to the device failed");
        }
    }

    /// Counts memory that is given up for good.
    pub(crate) fn count_leak(&self, bytes: u64) {
        self.leaked_bytes.fetch_add(bytes, Ordering::Relaxed);
        tracing::error!(
            bytes,
            "memory is given up: the driver cannot say that it is unused"
        );
    }

    /// Bytes given up so far: 0 unless the driver failed when it was asked to wait.
    pub(crate) fn leaked_bytes(&self) -> u64 {
        self.leaked_bytes.load(Ordering::Relaxed)
    }

    /// The driver's number of the device.
    pub(super) fn device(&self) -> i32 {
        self.device
    }

    /// An attribute of the device.
    pub(crate) fn attribute(&self, attribute: i32) -> Result<i32, GdsError> {
        let mut value = 0;
        // SAFETY: the result is written to `value`, which outlives the call.
        let code = unsafe {
            (self.driver.functions.device_attribute)(&raw mut value, attribute, self.device)
        };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// The device's name and its UUID.
    pub(crate) fn identity(&self) -> Result<(String, [u8; 16]), GdsError> {
        let mut name = [0_u8; 256];
        // SAFETY: the name is written to `name`, cut to the length given.
        let code = unsafe {
            (self.driver.functions.device_name)(
                name.as_mut_ptr().cast(),
                name.len() as i32,
                self.device,
            )
        };
        self.check("cuDeviceGetName", code)?;
        let mut uuid = [0; 16];
        // SAFETY: sixteen bytes are written to `uuid`.
        let code = unsafe { (self.driver.functions.device_uuid)(&raw mut uuid, self.device) };
        self.check("cuDeviceGetUuid_v2", code)?;
        let end = name
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(name.len());
        Ok((String::from_utf8_lossy(&name[..end]).into_owned(), uuid))
    }

    /// Free and total bytes of the device.
    pub(crate) fn memory(&self) -> Result<(u64, u64), GdsError> {
        let (mut free, mut total) = (0, 0);
        let functions = self.enter()?;
        // SAFETY: both results are written to locals that outlive the call.
        let code = unsafe { (functions.memory_info)(&raw mut free, &raw mut total) };
        self.check("cuMemGetInfo_v2", code)?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: pairs with the retain; everything made in the context keeps an `Arc` of it and
        // is gone.
        let code = unsafe { (self.driver.functions.context_release)(self.device) };
        self.note("cuDevicePrimaryCtxRelease_v2", code);
    }
}

/// An order of work on a device. Not the default stream, and in no order with it.
#[derive(Debug)]
pub(crate) struct Stream {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: stream handles may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver orders calls of several threads on one stream somehow.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Stream, GdsError> {
        let mut handle = null_mut();
        let functions = context.enter()?;
        // SAFETY: the result is written to `handle`, which outlives the call.
        let code = unsafe { (functions.stream_create)(&raw mut handle, NON_BLOCKING) };
        context.check("cuStreamCreate", code)?;
        Ok(Stream {
            context: context.clone(),
            handle,
        })
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    /// Waits for all work queued so far.
    pub(crate) fn synchronize(&self) -> Result<(), GdsError> {
        let functions = self.context.enter()?;
        // SAFETY: the stream lives as long as `self`.
        let code = unsafe { (functions.stream_synchronize)(self.handle) };
        self.context.check("cuStreamSynchronize", code)
    }

    /// Waits for all work queued so far, and asks again if the first answer is an error: what the
    /// work uses can be given back only then. `false`: it cannot, ever.
    pub(crate) fn is_idle_after_waiting(&self) -> bool {
        self.synchronize().is_ok() || self.synchronize().is_ok()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let functions = self.context.enter_to_give_back();
        // SAFETY: ours, and not used after this. Work still queued goes on: what it uses is kept
        // by a flight, not by the stream.
        let code = unsafe { (functions.stream_destroy)(self.handle) };
        self.context.note("cuStreamDestroy_v2", code);
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub(crate) struct Event {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: event handles may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Event, GdsError> {
        let mut handle = null_mut();
        let functions = context.enter()?;
        // SAFETY: the result is written to `handle`, which outlives the call.
        let code = unsafe { (functions.event_create)(&raw mut handle, SLEEPING | WITHOUT_TIME) };
        context.check("cuEventCreate", code)?;
        Ok(Event {
            context: context.clone(),
            handle,
        })
    }

    /// Stands for all work queued on the stream so far.
    pub(crate) fn record(&self, stream: &Stream) -> Result<(), GdsError> {
        let functions = self.context.enter()?;
        // SAFETY: both live across the call; of two contexts, the driver refuses them.
        let code = unsafe { (functions.event_record)(self.handle, stream.handle) };
        self.context.check("cuEventRecord", code)
    }

    /// Whether the work it stands for is done.
    pub(crate) fn is_done(&self) -> Result<bool, GdsError> {
        let functions = self.context.enter()?;
        // SAFETY: the event lives as long as `self`.
        match unsafe { (functions.event_query)(self.handle) } {
            code::NOT_READY => Ok(false),
            code => self.context.check("cuEventQuery", code).map(|()| true),
        }
    }

    /// Waits for the work it stands for.
    pub(crate) fn wait(&self) -> Result<(), GdsError> {
        let functions = self.context.enter()?;
        // SAFETY: the event lives as long as `self`.
        let code = unsafe { (functions.event_synchronize)(self.handle) };
        self.context.check("cuEventSynchronize", code)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let functions = self.context.enter_to_give_back();
        // SAFETY: ours, and not used after this.
        let code = unsafe { (functions.event_destroy)(self.handle) };
        self.context.note("cuEventDestroy_v2", code);
    }
}
