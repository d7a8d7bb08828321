//! From the disk to the device by GPUDirect Storage, where the strict open says that it works.

use pinion_gds::{Backend, CuFile, DirectBackend, DmaFile, Piece, PoolLimits};

use super::disk::forget;
use super::{Trouble, data_file, device};
use crate::config::Config;
use crate::figures::{Figures, gb_s};

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let Some(path) = &config.cufile else {
        figures.missing("DirectBackend", "no library was given (--cufile)");
        return Ok(());
    };
    let device = device(config)?;
    let cufile = match CuFile::open_strict(path) {
        Ok(cufile) => cufile,
        Err(error) => {
            figures.missing(
                "DirectBackend",
                format!("no GPUDirect Storage here: {error}"),
            );
            return Ok(());
        }
    };
    let backend = DirectBackend::new(&device, cufile, PoolLimits::default());
    let file = DmaFile::open(&data_file(&config.folder))?;
    let region = backend.allocate(config.file_bytes)?;
    let whole = [Piece {
        file_offset: 0,
        region_offset: 0,
        bytes: config.file_bytes,
    }];
    for with in ["first", "second"] {
        forget(file.buffered());
        let report = backend.load(&file, &whole, &region)?;
        let rate = gb_s(report.bytes, report.elapsed);
        let with = format!("{with}, by {}", report.path);
        figures.put("disk: DirectBackend::load, cold", &with, rate, "GB/s", None);
        if let Some(reason) = report.reason {
            figures.fact("DirectBackend::load", reason);
        }
    }
    Ok(())
}
