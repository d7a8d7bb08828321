//! Rows by their numbers, as `python/pinion/kernels/gather.cu` says them. Any grid gives the same,
//! so the grid is not looked at.

use super::{Kernel, Launch, Need, Params};
use crate::codes::{Answer, MISALIGNED_ADDRESS};
use crate::violations::violation;

/// Numbers read at once.
const CHUNK: u64 = 4096;

/// Columns that are declared one by one; a launch over more declares the span of all.
const MAX_DECLARED: u64 = 1024;

/// Elements at constant distances: rows by columns, of `width` bytes each.
#[derive(Debug, Clone, Copy)]
struct Grid {
    address: u64,
    rows: u64,
    row_step: u64,
    columns: u64,
    column_step: u64,
    width: u64,
}

impl Grid {
    /// Saturates: what lies beyond all memory faults when it is reached.
    fn at(&self, row: u64, column: u64) -> u64 {
        let into = row.saturating_mul(self.row_step);
        let across = column.saturating_mul(self.column_step);
        self.address.saturating_add(into).saturating_add(across)
    }

    /// The ranges it lies in. Columns that lie apart are told one by one.
    fn needs(&self, write: bool) -> Vec<Need> {
        if self.rows == 0 || self.columns == 0 {
            return Vec::new();
        }
        let column_bytes = (self.rows - 1)
            .saturating_mul(self.row_step)
            .saturating_add(self.width);
        let apart = self.column_step >= column_bytes && self.columns <= MAX_DECLARED;
        let (parts, columns) = if apart {
            (self.columns, 1)
        } else {
            (1, self.columns)
        };
        let need = |part| Need {
            address: self.at(0, part),
            bytes: column_bytes.saturating_add((columns - 1).saturating_mul(self.column_step)),
            write,
            whole: self.row_step <= columns.saturating_mul(self.width)
                && (columns == 1 || self.column_step <= self.width),
        };
        (0..parts).map(need).collect()
    }

    fn check_alignment(&self, name: &str) -> Answer {
        let all = self.address | self.row_step | self.column_step;
        if all.is_multiple_of(self.width) {
            return Ok(());
        }
        violation(format!(
            "{name} reaches {:#x} in steps of {} and {}: not all multiples of {}",
            self.address, self.row_step, self.column_step, self.width
        ));
        Err(MISALIGNED_ADDRESS)
    }
}

/// The numbers of rows that a launch is about.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    address: u64,
    count: u64,
    /// Rows there are: other numbers are of none.
    row_count: u64,
}

impl Numbers {
    fn need(&self) -> Need {
        Need {
            address: self.address,
            bytes: self.count.saturating_mul(8),
            write: false,
            whole: true,
        }
    }

    /// Runs `each` with every place and its row, None for a number of none.
    fn each(
        &self,
        launch: &mut Launch,
        mut each: impl FnMut(&mut Launch, u64, Option<u64>) -> Answer,
    ) -> Answer {
        let mut buffer = [0; 8 * CHUNK as usize];
        for start in (0..self.count).step_by(CHUNK as usize) {
            let part = &mut buffer[..8 * CHUNK.min(self.count - start) as usize];
            launch.read(self.address.saturating_add(start.saturating_mul(8)), part)?;
            let (numbers, _) = part.as_chunks();
            for (place, number) in (start..).zip(numbers) {
                let row = u64::try_from(i64::from_le_bytes(*number)).ok();
                each(launch, place, row.filter(|row| *row < self.row_count))?;
            }
        }
        Ok(())
    }
}

/// What the parameters of `pinion_gather_*` say: numbers, source, output, fill.
fn parse<const WIDTH: usize>(params: &Params) -> (Numbers, Grid, Grid, [u8; WIDTH]) {
    let numbers = Numbers {
        address: params.u64(0),
        count: params.u64(1),
        row_count: params.u64(3),
    };
    let source = Grid {
        address: params.u64(2),
        rows: numbers.row_count,
        row_step: params.u64(4),
        columns: params.u64(5),
        column_step: params.u64(6),
        width: WIDTH as u64,
    };
    let out = Grid {
        address: params.u64(7),
        rows: numbers.count,
        row_step: params.u64(8),
        columns: source.columns,
        column_step: params.u64(9),
        width: WIDTH as u64,
    };
    let halves = [params.u64(10).to_le_bytes(), params.u64(11).to_le_bytes()];
    let mut fill = [0; WIDTH];
    fill.copy_from_slice(&halves.concat()[..WIDTH]);
    (numbers, source, out, fill)
}

/// `pinion_gather_N`.
pub(super) const fn kernel<const WIDTH: usize>(name: &'static str) -> Kernel {
    Kernel {
        name,
        params: &[8; 12],
        needs: |params| {
            let (numbers, source, out, _) = parse::<WIDTH>(params);
            let mut needs = vec![numbers.need()];
            if numbers.count > 0 {
                needs.extend(source.needs(false));
            }
            needs.extend(out.needs(true));
            needs
        },
        run: |launch| {
            let (numbers, source, out, fill) = parse::<WIDTH>(&launch.params);
            source.check_alignment(launch.name)?;
            out.check_alignment(launch.name)?;
            numbers.each(launch, |launch, place, row| {
                for column in 0..source.columns {
                    let mut value = fill;
                    if let Some(row) = row {
                        launch.read(source.at(row, column), &mut value)?;
                    }
                    launch.write(out.at(place, column), &value)?;
                }
                Ok(())
            })
        },
    }
}

/// What the parameters of `pinion_found` say.
fn parse_found(params: &Params) -> (Numbers, Grid) {
    let numbers = Numbers {
        address: params.u64(0),
        count: params.u64(1),
        row_count: params.u64(2),
    };
    let out = Grid {
        address: params.u64(3),
        rows: numbers.count,
        row_step: params.u64(4),
        columns: 1,
        column_step: 1,
        width: 1,
    };
    (numbers, out)
}

/// `pinion_found`.
pub(super) const FOUND: Kernel = Kernel {
    name: "pinion_found",
    params: &[8; 5],
    needs: |params| {
        let (numbers, out) = parse_found(params);
        let mut needs = out.needs(true);
        needs.push(numbers.need());
        needs
    },
    run: |launch| {
        let (numbers, out) = parse_found(&launch.params);
        numbers.each(launch, |launch, place, row| {
            launch.write(out.at(place, 0), &[u8::from(row.is_some())])
        })
    },
};
