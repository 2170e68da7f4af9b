//! The creation of a sandbox: runs beside its driver, which alone may tell it to stop.

use super::{
    Deps, SandboxError, blocking,
    configure::configure,
    millis,
    network::Link,
    record::{BoundaryStatus, NetworkStatus, Record},
};
use crate::{failpoint, status::chain};
use a3s_box_types::{network::GuestNetwork, sandbox::Event};
use std::{
    collections::{BTreeMap, HashMap},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Where the boundary of a new sandbox comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It is to be started.
    New,
    /// It waits under the sandbox's id.
    Spare,
}

/// The record as far as the creation came, and how it ended. On an error something may be left, for
/// teardown to find.
pub async fn create(
    mut record: Record,
    origin: Origin,
    deps: Deps,
    stop: CancellationToken,
) -> (Record, Result<(), SandboxError>) {
    let result = match steps(&mut record, origin, &deps, &stop).await {
        Err(error) if deps.shims.clone_failed(&record.id, &record.spec).await => {
            warn!(why = chain(&error), "the clone is replaced by a guest that is booted");
            match undo(&record, &deps).await {
                Ok(()) => steps(&mut record, Origin::New, &deps, &stop).await,
                Err(error) => Err(error),
            }
        }
        result => result,
    };
    (record, result)
}

/// Leaves nothing but the record.
async fn undo(record: &Record, deps: &Deps) -> Result<(), SandboxError> {
    let (id, spec) = (&record.id, &record.spec);
    deps.shims.end(id).await?;
    deps.network.teardown(id, spec).await?;
    deps.shims.forget(id).await
}

async fn steps(
    record: &mut Record,
    origin: Origin,
    deps: &Deps,
    stop: &CancellationToken,
) -> Result<(), SandboxError> {
    let started = Instant::now();
    save(record, deps).await?;
    failpoint::hit("sandbox-intent-saved");
    let waiting = match origin {
        Origin::New => false,
        Origin::Spare => claimed(record, deps).await?,
    };
    let link = match waiting {
        true => None,
        false => Some(deps.network.prepare(&record.id, &record.spec).await?),
    };
    failpoint::hit("sandbox-netns-made");
    let network = network_and_boundary(record, deps, link, stop).await?;
    let side_by_side = started.elapsed();
    record.network = Some(network.clone());
    save(record, deps).await?;
    failpoint::hit("sandbox-network-saved");
    let joined = deps.network.join(&record.id, &record.spec, &network).await;
    let guest = joined.as_ref().map_or_else(|_| GuestNetwork::default(), Clone::clone);
    let order = configure(&record.id, &record.spec, &guest);
    let shim = deps.shims.client(&record.id);
    // Asked in any case: a machine that has ended took its card with it, and its shim says why.
    let answer = unless_stopped(record, stop, shim.configure(order)).await?;
    joined?;
    failpoint::hit("sandbox-configured");
    // A guest that waited counts from a start that was before the pod's.
    let stages = if waiting { HashMap::new() } else { answer.stages_ms };
    let mut stages_ms: BTreeMap<_, _> = stages.into_iter().collect();
    stages_ms.insert("server_network_and_shim".to_owned(), millis(side_by_side));
    stages_ms.insert("server_total".to_owned(), millis(started.elapsed()));
    record.boundary = Some(BoundaryStatus { kernel_release: answer.kernel_release, stages_ms });
    if stop.is_cancelled() {
        return Err(stopped(record));
    }
    record.state = record.state.on(Event::Booted)?;
    save(record, deps).await?;
    failpoint::hit("sandbox-ready-saved");
    Ok(())
}

/// Whether the guest that waited under this id is the sandbox's now. One that is of no use leaves nothing.
async fn claimed(record: &Record, deps: &Deps) -> Result<bool, SandboxError> {
    let (id, spec) = (&record.id, &record.spec);
    let why = match deps.shims.claim(id, spec).await {
        Ok(true) => return Ok(true),
        Ok(false) => "it has ended, or was made of what is not today's".to_owned(),
        Err(error) => chain(&error),
    };
    warn!(why, "the waiting guest is replaced");
    undo(record, deps).await?;
    Ok(false)
}

/// CNI ADD and the start of the boundary, or its move to its place, side by side. The boundary may be given
/// up at any time; ADD always runs to its end.
async fn network_and_boundary(
    record: &Record,
    deps: &Deps,
    link: Option<Link>,
    stop: &CancellationToken,
) -> Result<NetworkStatus, SandboxError> {
    let (id, spec) = (&record.id, &record.spec);
    let attach = deps.network.attach(id, spec);
    let start = async {
        match link {
            Some(link) => deps.shims.start(id, spec, link).await,
            None => deps.shims.move_in(id, spec).await,
        }
    };
    let start = unless_stopped(record, stop, start);
    tokio::pin!(attach, start);
    tokio::select! {
        network = &mut attach => {
            let network = network?;
            failpoint::hit("sandbox-network-attached");
            start.await?;
            failpoint::hit("sandbox-shim-started");
            Ok(network)
        }
        begun = &mut start => {
            failpoint::hit("sandbox-shim-started");
            let network = attach.await;
            failpoint::hit("sandbox-network-attached");
            begun?;
            network
        }
    }
}

async fn unless_stopped<T>(
    record: &Record,
    stop: &CancellationToken,
    work: impl Future<Output = Result<T, SandboxError>>,
) -> Result<T, SandboxError> {
    stop.run_until_cancelled(work).await.unwrap_or_else(|| Err(stopped(record)))
}

fn stopped(record: &Record) -> SandboxError {
    SandboxError::Stopped { kind: "sandbox", id: record.id.to_string() }
}

/// Saves the record beside the runtime.
pub async fn save(record: &Record, deps: &Deps) -> Result<(), SandboxError> {
    let (record, store) = (record.clone(), deps.store.clone());
    blocking("save the sandbox's record", move || record.save(&store)).await
}
