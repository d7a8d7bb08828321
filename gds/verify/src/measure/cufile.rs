//! From the disk to the device by cuFile as it opens by itself: in compatibility mode, where
//! GPUDirect Storage does not work.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use super::disk::forget;
use super::spread::{Shape, Worker, rate, shapes};
use super::{Trouble, data_file, sizes};
use crate::claims::{MIB, Named, open};
use crate::config::Config;
use crate::figures::{Figures, repeat, size};
use crate::sys::cufile::CuFile;
use crate::sys::driver::{Driver, READ_WRITE};

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let Some(path) = &config.cufile else {
        figures.missing("cuFile", "no library was given (--cufile)");
        return Ok(());
    };
    if !config.cufile_opens {
        figures.missing("cuFile", "cuFileDriverOpen does not come back");
        return Ok(());
    }
    let driver = open(config)?;
    let cufile = CuFile::load(path)?;
    if let Ok(version) = cufile.version() {
        figures.fact("cuFile", format!("{version} from {}", path.display()));
    }
    if let Err(code) = cufile.open() {
        figures.missing("cuFile", format!("cuFileDriverOpen answers {code}"));
        return Ok(());
    }
    let mut direct = OpenOptions::new();
    direct.read(true).custom_flags(libc::O_DIRECT);
    let name = data_file(&config.folder);
    let file = direct.open(&name).or_else(|_| File::open(&name))?;
    let handle = match cufile.register_file(&file) {
        Ok(handle) => handle,
        Err(code) => {
            let why = format!("cuFileHandleRegister answers {code} (5027: no udev database)");
            figures.missing("cuFile", why);
            return Ok(());
        }
    };
    let bytes = usize::try_from(config.file_bytes)?;
    let address = exportable(&driver, bytes)?;
    let reads = Reads {
        driver: &driver,
        cufile: &cufile,
        handle,
        address,
        context: driver.get_current().named("cuCtxGetCurrent")?,
    };
    loads(config, figures, &reads, &file)?;
    match cufile.register(address, bytes) {
        Ok(()) => {
            let with = "16 threads, blocks of 16 MiB, registered";
            for shape in shapes(config) {
                if (shape.threads, shape.block_bytes) == (16, 16 << 20) {
                    let rate = rate(shape, config.file_bytes, config.each, || {
                        reads.blocks(shape)
                    })?;
                    figures.put("cuFile: read", with, rate, "GB/s", None);
                }
            }
            if let Err(code) = cufile.deregister(address) {
                figures.missing("cuFile: deregister", format!("answers {code}"));
            }
        }
        Err(code) => figures.missing(
            "cuFile: registered memory",
            format!("cuFileBufRegister answers {code}"),
        ),
    }
    small(config, figures, &reads)
}

fn loads(
    config: &Config,
    figures: &Figures,
    reads: &Reads<'_>,
    file: &File,
) -> Result<(), Trouble> {
    let whole = usize::try_from(config.file_bytes.min(256 << 20))?;
    forget(file);
    for shape in shapes(config) {
        let rate = rate(shape, config.file_bytes, config.each, || {
            reads.blocks(shape)
        })?;
        figures.put("cuFile: read", &shape.describe(), rate, "GB/s", None);
    }
    // That what arrives is what the file holds.
    reads.read(0, whole)?;
    let out = crate::sys::host::HostBytes::pageable(MIB);
    reads
        .driver
        .copy_out(&out, reads.address, MIB)
        .named("cuMemcpyDtoH")?;
    let mut expected = vec![0; MIB];
    File::open(data_file(&config.folder))?.read_exact_at(&mut expected, 0)?;
    let right = (0..MIB).filter(|at| out.get(*at) == expected[*at]).count();
    figures.fact("cuFile: bytes right", format!("{right} of {MIB}"));
    Ok(())
}

fn small(config: &Config, figures: &Figures, reads: &Reads<'_>) -> Result<(), Trouble> {
    for bytes in sizes(config, &[8, 64, 512, 4096]) {
        let mut at = 0;
        let times = repeat(config.each, 2000, || {
            at = (at + (1 << 20)) % config.file_bytes;
            reads.read(at, bytes as usize)
        })?;
        figures.put(
            "cuFile: small read, median",
            &size(bytes),
            times.median(),
            "us",
            None,
        );
    }
    Ok(())
}

/// Device memory as this project makes it.
fn exportable(driver: &Driver, bytes: usize) -> Result<u64, Trouble> {
    let bytes = bytes.next_multiple_of(2 * MIB);
    let handle = driver.create(bytes, true).named("cuMemCreate")?;
    let address = driver.reserve(bytes).named("cuMemAddressReserve")?;
    driver.map(address, bytes, 0, handle).named("cuMemMap")?;
    driver
        .set_access(address, bytes, READ_WRITE)
        .named("cuMemSetAccess")?;
    Ok(address)
}

#[derive(Clone, Copy)]
struct Reads<'a> {
    driver: &'a Driver,
    cufile: &'a CuFile,
    handle: usize,
    address: u64,
    context: usize,
}

impl<'a> Reads<'a> {
    fn blocks(self, shape: Shape) -> Result<Blocks<'a>, Trouble> {
        // A thread has the context current that it uses.
        let context = self.context;
        self.driver.set_current(context).named("cuCtxSetCurrent")?;
        Ok(Blocks {
            reads: self,
            bytes: usize::try_from(shape.block_bytes)?,
        })
    }

    fn read(&self, offset: u64, bytes: usize) -> Result<(), Trouble> {
        let came = self
            .cufile
            .read(self.handle, self.address, offset, offset, bytes);
        match came.result == bytes as isize {
            true => Ok(()),
            false => Err(format!("cuFileRead of {bytes} bytes at {offset}: {came:?}").into()),
        }
    }
}

/// One thread's reads, a block at a time.
struct Blocks<'a> {
    reads: Reads<'a>,
    bytes: usize,
}

impl Worker for Blocks<'_> {
    fn bring(&mut self, offset: u64) -> Result<(), Trouble> {
        self.reads.read(offset, self.bytes)
    }

    fn finish(self) -> Result<(), Trouble> {
        Ok(())
    }
}
