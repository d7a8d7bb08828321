//! A peer to compare with: a Flight server as arrow-flight's documentation has it.
//!
//! tonic, and `FlightDataEncoderBuilder` over the batches of an Arrow IPC file. The file is read
//! into memory once and its batches are decoded from there without copying, so serving starts
//! from the same place as from a mapped file. The encoder's limit on a message is raised: at its
//! default it counts the whole file for each batch and sends two rows at a time.

mod support;

use std::fs::File;
use std::io::Read;
use std::pin::Pin;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_buffer::{Buffer, MutableBuffer};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::flight_service_server::{FlightService, FlightServiceServer};
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo,
    HandshakeRequest, HandshakeResponse, PollInfo, PutResult, SchemaResult, Ticket,
};
use arrow_ipc::convert::fb_to_schema;
use arrow_ipc::reader::{FileDecoder, read_footer_length};
use arrow_schema::SchemaRef;
use futures::{Stream, TryStreamExt, stream};
use support::Arguments;
use tonic::{Request, Response, Status, Streaming};

const USAGE: &str = "tonic_flight_server: an Arrow IPC file, served by arrow-flight's encoder

  --file path             the file
  --listen HOST:PORT      where, over TCP
  --uds path              where, over a Unix socket
  --batch-rows n          rows of a message at most (default: as in the file)
";

struct Served {
    schema: SchemaRef,
    batches: Arc<Vec<RecordBatch>>,
}

fn load(path: &str, batch_rows: usize) -> Served {
    let mut file = File::open(path).expect("cannot open the file");
    let bytes = file.metadata().expect("no such file").len() as usize;
    let mut memory = MutableBuffer::from_len_zeroed(bytes);
    file.read_exact(memory.as_slice_mut())
        .expect("cannot read the file");
    let file = Buffer::from(memory);
    let trailer = bytes - 10;
    let trailer_bytes = file[trailer..].try_into().expect("ten bytes");
    let length = read_footer_length(trailer_bytes).expect("no Arrow IPC file");
    let footer =
        arrow_ipc::root_as_footer(&file[trailer - length..trailer]).expect("no Arrow IPC file");
    let schema = Arc::new(fb_to_schema(footer.schema().expect("no schema")));
    let mut decoder = FileDecoder::new(Arc::clone(&schema), footer.version());
    let block = |block: &arrow_ipc::Block| {
        let length = block.bodyLength() as usize + block.metaDataLength() as usize;
        file.slice_with_length(block.offset() as usize, length)
    };
    for dictionary in footer.dictionaries().into_iter().flatten() {
        decoder
            .read_dictionary(dictionary, &block(dictionary))
            .expect("cannot read a dictionary");
    }
    let mut batches = Vec::new();
    for rows in footer.recordBatches().into_iter().flatten() {
        let batch = decoder
            .read_record_batch(rows, &block(rows))
            .expect("cannot read a batch")
            .expect("no batch");
        let step = batch_rows.min(batch.num_rows()).max(1);
        for start in (0..batch.num_rows()).step_by(step) {
            batches.push(batch.slice(start, step.min(batch.num_rows() - start)));
        }
    }
    Served {
        schema,
        batches: Arc::new(batches),
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn unused<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("only DoGet"))
}

#[tonic::async_trait]
impl FlightService for Served {
    type HandshakeStream = Replies<HandshakeResponse>;
    type ListFlightsStream = Replies<FlightInfo>;
    type DoGetStream = Replies<FlightData>;
    type DoPutStream = Replies<PutResult>;
    type DoExchangeStream = Replies<FlightData>;
    type DoActionStream = Replies<arrow_flight::Result>;
    type ListActionsStream = Replies<ActionType>;

    async fn do_get(&self, _: Request<Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        let batches = Arc::clone(&self.batches);
        let rows = stream::iter((0..batches.len()).map(move |at| Ok(batches[at].clone())));
        let messages = FlightDataEncoderBuilder::new()
            .with_schema(Arc::clone(&self.schema))
            .with_max_flight_data_size(usize::MAX)
            .build(rows)
            .map_err(Status::from);
        Ok(Response::new(Box::pin(messages)))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        unused()
    }

    async fn list_flights(
        &self,
        _: Request<Criteria>,
    ) -> Result<Response<Self::ListFlightsStream>, Status> {
        unused()
    }

    async fn get_flight_info(
        &self,
        _: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        unused()
    }

    async fn poll_flight_info(
        &self,
        _: Request<FlightDescriptor>,
    ) -> Result<Response<PollInfo>, Status> {
        unused()
    }

    async fn get_schema(
        &self,
        _: Request<FlightDescriptor>,
    ) -> Result<Response<SchemaResult>, Status> {
        unused()
    }

    async fn do_put(
        &self,
        _: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoPutStream>, Status> {
        unused()
    }

    async fn do_exchange(
        &self,
        _: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoExchangeStream>, Status> {
        unused()
    }

    async fn do_action(
        &self,
        _: Request<Action>,
    ) -> Result<Response<Self::DoActionStream>, Status> {
        unused()
    }

    async fn list_actions(
        &self,
        _: Request<Empty>,
    ) -> Result<Response<Self::ListActionsStream>, Status> {
        unused()
    }
}

#[tokio::main]
async fn main() {
    let arguments = Arguments::parse(USAGE);
    let served = load(
        arguments.needed("file"),
        arguments.number("batch-rows", usize::MAX),
    );
    let server = tonic::transport::Server::builder().add_service(FlightServiceServer::new(served));
    let ended = match arguments.text("uds") {
        Some(path) => {
            let listener = tokio::net::UnixListener::bind(path).expect("cannot bind");
            println!("ready");
            let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
            server.serve_with_incoming(incoming).await
        }
        None => {
            let listener = tokio::net::TcpListener::bind(arguments.needed("listen"))
                .await
                .expect("cannot bind");
            println!("ready {}", listener.local_addr().expect("a bound address"));
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            server.serve_with_incoming(incoming).await
        }
    };
    ended.expect("the server failed");
}
