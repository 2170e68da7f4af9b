//! The creation of a sandbox: runs beside its driver, which alone may tell it to stop.

use super::{
    Deps, SandboxError, blocking,
    configure::configure,
    millis,
    network::Link,
    record::{BoundaryStatus, NetworkStatus, Record},
};
use crate::failpoint;
use a3s_box_types::sandbox::Event;
use std::time::Instant;
use tokio_util::sync::CancellationToken;

/// The record as far as the creation came, and how it ended. On an error something may be left, for
/// teardown to find.
pub async fn create(
    mut record: Record,
    deps: Deps,
    stop: CancellationToken,
) -> (Record, Result<(), SandboxError>) {
    let result = steps(&mut record, &deps, &stop).await;
    (record, result)
}

async fn steps(
    record: &mut Record,
    deps: &Deps,
    stop: &CancellationToken,
) -> Result<(), SandboxError> {
    let started = Instant::now();
    save(record, deps).await?;
    failpoint::hit("sandbox-intent-saved");
    let link = deps.network.prepare(&record.id, &record.spec).await?;
    failpoint::hit("sandbox-netns-made");
    let network = network_and_boundary(record, deps, link, stop).await?;
    let side_by_side = started.elapsed();
    record.network = Some(network.clone());
    save(record, deps).await?;
    failpoint::hit("sandbox-network-saved");
    let guest = deps.network.join(&record.id, &record.spec, &network).await?;
    let order = configure(&record.id, &record.spec, &guest);
    let shim = deps.shims.client(&record.id);
    let answer = unless_stopped(record, stop, shim.configure(order)).await?;
    failpoint::hit("sandbox-configured");
    let mut stages_ms: std::collections::BTreeMap<_, _> = answer.stages_ms.into_iter().collect();
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

/// CNI ADD and the start of the boundary side by side. The boundary may be given up at any time; ADD
/// always runs to its end.
async fn network_and_boundary(
    record: &Record,
    deps: &Deps,
    link: Link,
    stop: &CancellationToken,
) -> Result<NetworkStatus, SandboxError> {
    let attach = deps.network.attach(&record.id, &record.spec);
    let start = unless_stopped(record, stop, deps.shims.start(&record.id, &record.spec, link));
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
