//! Reads as long as there is a launcher, and looks for its successor when it has a path.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use proto::launch::v1 as wire;
use tracing::{debug, info, warn};

use super::table::Shared;
use super::{AWAY_PATIENCE, LARGEST_PACKET, greeting};
use crate::sandbox::packet::{Descriptors, PacketSocket};

/// Time between attempts to find a launcher again.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Ends when the launcher is gone for good: at once without a path, otherwise never.
pub(super) async fn keep(shared: Arc<Shared>, mut socket: Arc<PacketSocket>, path: Option<PathBuf>) {
    loop {
        let reason = read_loop(&shared, &socket).await;
        let Some(path) = &path else { return shared.close(&reason) };
        warn!(reason, "the launcher is away, its sandboxes live on");
        shared.away(&reason);
        socket = loop {
            tokio::time::sleep(RETRY_AFTER).await;
            match tokio::time::timeout(AWAY_PATIENCE, rejoin(&shared, path)).await {
                Ok(Ok(socket)) => break socket,
                Ok(Err(problem)) => debug!(problem, "the launcher is not back yet"),
                Err(_) => debug!("the launcher does not answer yet"),
            }
        };
        info!("the launcher is back");
    }
}

/// Greets a new launcher and compares what it holds with what we count on.
async fn rejoin(shared: &Shared, path: &Path) -> Result<Arc<PacketSocket>, String> {
    let socket = PacketSocket::connect(path, LARGEST_PACKET, Descriptors::Accepted).map_err(|e| e.to_string())?;
    match ask(shared, &socket, greeting::hello()).await? {
        wire::reply::Body::Welcome(welcome) if greeting::is_ours(&welcome) => {}
        _ => return Err("its first answer is not a welcome".to_owned()),
    }
    let list = wire::request::Body::ListSandboxes(wire::ListSandboxes::default());
    let wire::reply::Body::SandboxList(list) = ask(shared, &socket, list).await? else {
        return Err("it does not say which sandboxes it holds".to_owned());
    };
    let socket = Arc::new(socket);
    let held = list.sandboxes.into_iter().map(|entry| entry.sandbox_id).collect();
    for sandbox_id in shared.back(&socket, held) {
        shared.discard(&socket, sandbox_id).await;
    }
    Ok(socket)
}

/// One exchange on a connection that nobody else uses yet.
async fn ask(shared: &Shared, socket: &PacketSocket, body: wire::request::Body) -> Result<wire::reply::Body, String> {
    let request_id = shared.request_id();
    let packet = wire::Request { request_id, body: Some(body) }.encode_to_vec();
    socket.send(&packet).await.map_err(|error| error.to_string())?;
    let mut buffer = socket.buffer();
    loop {
        let packet = socket.receive(&mut buffer).await.map_err(|error| error.to_string())?;
        let reply = wire::Reply::decode(packet.bytes).map_err(|error| error.to_string())?;
        match reply.body {
            Some(wire::reply::Body::SandboxEnded(ended)) => shared.end_sandbox(&ended),
            Some(body) if reply.request_id == request_id => return Ok(body),
            _ => return Err("it answered something else".to_owned()),
        }
    }
}

async fn read_loop(shared: &Shared, socket: &PacketSocket) -> String {
    let mut buffer = socket.buffer();
    loop {
        let packet = match socket.receive(&mut buffer).await {
            Ok(packet) => packet,
            Err(error) => return error.to_string(),
        };
        let delivered = wire::Reply::decode(packet.bytes)
            .map_err(|error| format!("a reply could not be decoded: {error}"))
            .and_then(|reply| shared.deliver(reply, packet.descriptors));
        match delivered {
            Ok(None) => {}
            Ok(Some(sandbox_id)) => shared.discard(socket, sandbox_id).await,
            Err(reason) => {
                warn!(reason, "connection to the launcher was given up");
                return reason;
            }
        }
    }
}
