//! Which of the machine's processors the guest's kernel uses. Those that are plugged in wait to be
//! brought online by us; those that are taken out of use stay plugged in.

use crate::{
    agent::blocking,
    config::Boundary,
    error::{Error, Step},
};
use a3s_box_api::agent::v1 as api;
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Kernel documentation, core-api/cpu_hotplug.
const FOLDER: &str = "/sys/devices/system/cpu";
/// Two translated processors may need seconds to agree on the time; a busy host makes it more.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// Uses the first `count`, once they are all there.
pub async fn set(
    boundary: Boundary,
    request: api::SetProcessorsRequest,
) -> Result<api::SetProcessorsResponse, Error> {
    if boundary != Boundary::Guest {
        return Err(Error::Unsupported("the number of processors outside a guest".to_owned()));
    }
    let count = request.count;
    if count == 0 {
        return Err(Error::invalid("count is 0: a guest has at least one processor"));
    }
    let since = Instant::now();
    while let Some(missing) = (1..count).find(|number| !switch(Path::new(FOLDER), *number).exists())
    {
        if since.elapsed() > PATIENCE {
            return Err(Error::NotNow(format!("processor {missing} did not appear")));
        }
        tokio::time::sleep(POLL).await;
    }
    blocking(move || use_first(Path::new(FOLDER), count)).await?;
    Ok(api::SetProcessorsResponse {})
}

/// The first has no switch: it is always used.
fn use_first(folder: &Path, count: u32) -> Result<(), Error> {
    let mut number = 1;
    while switch(folder, number).exists() {
        let (file, value) = (switch(folder, number), if number < count { "1" } else { "0" });
        let done = fs::read_to_string(&file).and_then(|now| match now.trim() == value {
            true => Ok(()),
            false => fs::write(&file, value),
        });
        done.or_else(gone).step(format_args!("{} = {value}", file.display()))?;
        number += 1;
    }
    Ok(())
}

fn switch(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("cpu{number}/online"))
}

/// Processors that are taken out while it is looked at need no switching.
fn gone(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_first_ones_are_used_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..4 {
            fs::create_dir(folder.path().join(format!("cpu{number}"))).unwrap();
        }
        for (number, value) in [(1, "1\n"), (2, "0\n"), (3, "0\n")] {
            fs::write(switch(folder.path(), number), value).unwrap();
        }
        let now = || [1, 2, 3].map(|n| fs::read_to_string(switch(folder.path(), n)).unwrap());
        use_first(folder.path(), 3).unwrap();
        assert_eq!(now(), ["1\n", "1", "0\n"]);
        use_first(folder.path(), 1).unwrap();
        assert_eq!(now(), ["0", "0", "0\n"]);
    }
}
