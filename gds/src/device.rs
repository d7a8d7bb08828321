//! One CUDA device: its context, its streams, its memory.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::backend::{DeviceInfo, DeviceKind, DeviceMemory};
use crate::error::GdsError;
use crate::sys::code::OUT_OF_MEMORY;
use crate::sys::context::{Context, Stream};
use crate::sys::driver::Driver;
use crate::sys::scratch::ScratchMemory;
use crate::sys::vmm::{DeviceBytes, VmmMemory, granularity, is_direct_rdma_capable, is_exportable};

/// A loaded CUDA driver.
#[derive(Debug, Clone)]
pub struct Cuda {
    driver: Arc<Driver>,
}

impl Cuda {
    /// Loads the driver by path or by name, `libcuda.so.1`, and initialises it. It stays loaded
    /// until the process ends.
    ///
    /// # Errors
    ///
    /// `Library` when it is missing or too old, `Driver` when it does not start (no GPU, a
    /// driver that does not fit the kernel module).
    pub fn load(library: &Path) -> Result<Cuda, GdsError> {
        Ok(Cuda {
            driver: Driver::load(library)?,
        })
    }

    /// Devices this process sees.
    ///
    /// # Errors
    ///
    /// `Driver`.
    pub fn device_count(&self) -> Result<u32, GdsError> {
        self.driver.device_count()
    }

    /// The driver's version: 13000 is CUDA 13.0.
    ///
    /// # Errors
    ///
    /// `Driver`.
    pub fn version(&self) -> Result<i32, GdsError> {
        self.driver.version()
    }

    /// Opens a device: its primary context is retained until everything of it is gone.
    ///
    /// # Errors
    ///
    /// `Driver` when there is no such device; `PathUnavailable` when its memory cannot be
    /// exported.
    pub fn device(&self, ordinal: u32) -> Result<Device, GdsError> {
        Device::open(&self.driver, ordinal)
    }
}

/// A CUDA device. Clones are the same device.
#[derive(Debug, Clone)]
pub struct Device {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    context: Arc<Context>,
    info: DeviceInfo,
    granularity_bytes: u64,
    direct_rdma: bool,
    /// Streams that nobody uses now.
    idle: Mutex<Vec<Arc<Stream>>>,
}

impl Device {
    fn open(driver: &Arc<Driver>, ordinal: u32) -> Result<Device, GdsError> {
        let context = Context::retain(driver, ordinal)?;
        let (model, uuid) = context.identity()?;
        let name = format!("{model} (GPU {ordinal})");
        if !is_exportable(&context)? {
            return Err(GdsError::PathUnavailable {
                path: crate::LoadPath::Bounce,
                reason: format!("{name} cannot export memory as a descriptor"),
            });
        }
        let direct_rdma = is_direct_rdma_capable(&context)?;
        let granularity_bytes = granularity(&context, direct_rdma)?;
        let info = DeviceInfo {
            kind: DeviceKind::Cuda,
            ordinal,
            uuid: uuid_text(uuid),
            name,
        };
        Ok(Device {
            shared: Arc::new(Shared {
                context,
                info,
                granularity_bytes,
                direct_rdma,
                idle: Mutex::default(),
            }),
        })
    }

    /// Which device it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    /// Its memory now.
    ///
    /// # Errors
    ///
    /// `Driver`.
    pub fn memory(&self) -> Result<DeviceMemory, GdsError> {
        let (free_bytes, total_bytes) = self.shared.context.memory()?;
        Ok(DeviceMemory {
            free_bytes,
            total_bytes,
        })
    }

    /// A stream that nobody else uses until it is dropped.
    ///
    /// # Errors
    ///
    /// `Driver`.
    pub fn stream(&self) -> Result<WorkStream, GdsError> {
        let idle = self.shared.idle.lock().pop();
        let stream = match idle {
            Some(stream) => stream,
            None => Arc::new(Stream::new(&self.shared.context)?),
        };
        Ok(WorkStream {
            device: self.clone(),
            stream,
        })
    }

    /// Device memory and pinned memory that was given up, because the driver failed when it was
    /// asked to wait for its last use. 0 on a driver that works.
    pub fn leaked_bytes(&self) -> u64 {
        self.shared.context.leaked_bytes()
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.shared.context
    }

    /// New zeroed memory that can be exported, its length rounded up to what the device hands
    /// out.
    pub(crate) fn allocate(&self, bytes: u64) -> Result<Arc<VmmMemory>, GdsError> {
        let rounded = bytes
            .max(1)
            .checked_next_multiple_of(self.shared.granularity_bytes);
        let total_bytes = self.memory()?.total_bytes;
        let Some(bytes) = rounded.filter(|bytes| *bytes <= total_bytes) else {
            return Err(self.out_of_memory(rounded.unwrap_or(u64::MAX)));
        };
        let context = &self.shared.context;
        let memory = VmmMemory::new(context, bytes as usize, self.shared.direct_rdma)
            .map_err(|error| self.name_the_room(error, bytes))?;
        let memory = Arc::new(memory);
        memory.clear(self.stream()?.shared())?;
        Ok(memory)
    }

    pub(crate) fn is_out_of_memory(&self, error: &GdsError) -> bool {
        matches!(error, GdsError::Driver { code, .. } if *code == OUT_OF_MEMORY)
    }

    /// The driver's "out of memory" with what was asked for and what is there.
    pub(crate) fn name_the_room(&self, error: GdsError, bytes: u64) -> GdsError {
        match self.is_out_of_memory(&error) {
            true => self.out_of_memory(bytes),
            false => error,
        }
    }

    fn out_of_memory(&self, bytes: u64) -> GdsError {
        GdsError::OutOfMemory {
            device: self.shared.info.name.clone(),
            bytes,
            free_bytes: self.memory().map_or(0, |memory| memory.free_bytes),
        }
    }
}

/// A stream of a device, for one user at a time. Its work is in no order with other streams.
#[derive(Debug)]
pub struct WorkStream {
    device: Device,
    stream: Arc<Stream>,
}

impl WorkStream {
    /// Waits for all work queued so far.
    ///
    /// # Errors
    ///
    /// `Driver`: of the wait, or of work before.
    pub fn synchronize(&self) -> Result<(), GdsError> {
        self.stream.synchronize()
    }

    pub(crate) fn shared(&self) -> &Arc<Stream> {
        &self.stream
    }
}

impl Drop for WorkStream {
    fn drop(&mut self) {
        // The next user's work comes after what is still queued: slower, never wrong.
        self.device.shared.idle.lock().push(self.stream.clone());
    }
}

/// Device memory that copies go to and come from. It lives until the last clone and the last
/// copy are gone.
#[derive(Debug, Clone)]
pub struct DeviceRange {
    memory: Arc<dyn DeviceBytes>,
}

impl DeviceRange {
    /// New zeroed memory of a device, by itself.
    ///
    /// # Errors
    ///
    /// `OutOfMemory`, `Driver`: nothing stays allocated.
    pub fn new(device: &Device, bytes: u64) -> Result<DeviceRange, GdsError> {
        Ok(DeviceRange::of(device.allocate(bytes)?))
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    pub(crate) fn of(memory: Arc<VmmMemory>) -> DeviceRange {
        DeviceRange { memory }
    }

    pub(crate) fn scratch(memory: ScratchMemory) -> DeviceRange {
        DeviceRange {
            memory: Arc::new(memory),
        }
    }

    pub(crate) fn memory(&self) -> &Arc<dyn DeviceBytes> {
        &self.memory
    }
}

/// As NVIDIA's tools print it.
pub(crate) fn uuid_text(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let groups = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    format!("GPU-{}", groups.join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_reads_as_nvidia_prints_it() {
        let bytes = std::array::from_fn(|n| (n * 17) as u8);
        assert_eq!(uuid_text(bytes), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }
}
