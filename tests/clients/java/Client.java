import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.grpc.netty.NettyChannelBuilder;
import io.netty.channel.MultiThreadIoEventLoopGroup;
import io.netty.channel.epoll.EpollDomainSocketChannel;
import io.netty.channel.epoll.EpollIoHandler;
import io.netty.channel.unix.DomainSocketAddress;
import io.netty.util.concurrent.DefaultThreadFactory;
import java.io.BufferedOutputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.FlightDescriptor;
import org.apache.arrow.flight.FlightEndpoint;
import org.apache.arrow.flight.FlightGrpcUtils;
import org.apache.arrow.flight.FlightInfo;
import org.apache.arrow.flight.FlightStream;
import org.apache.arrow.flight.Location;
import org.apache.arrow.memory.ArrowBuf;
import org.apache.arrow.memory.BufferAllocator;
import org.apache.arrow.memory.RootAllocator;
import org.apache.arrow.vector.BigIntVector;
import org.apache.arrow.vector.BitVector;
import org.apache.arrow.vector.FieldVector;
import org.apache.arrow.vector.Float4Vector;
import org.apache.arrow.vector.Float8Vector;
import org.apache.arrow.vector.IntVector;
import org.apache.arrow.vector.SmallIntVector;
import org.apache.arrow.vector.TimeStampVector;
import org.apache.arrow.vector.TinyIntVector;
import org.apache.arrow.vector.UInt1Vector;
import org.apache.arrow.vector.UInt2Vector;
import org.apache.arrow.vector.UInt4Vector;
import org.apache.arrow.vector.UInt8Vector;
import org.apache.arrow.vector.ValueVector;
import org.apache.arrow.vector.VarCharVector;
import org.apache.arrow.vector.VectorSchemaRoot;
import org.apache.arrow.vector.complex.FixedSizeListVector;
import org.apache.arrow.vector.types.FloatingPointPrecision;
import org.apache.arrow.vector.types.TimeUnit;
import org.apache.arrow.vector.types.pojo.ArrowType;
import org.apache.arrow.vector.types.pojo.Field;
import org.apache.arrow.vector.types.pojo.Schema;

/**
 * Reads from Pinion with flight-core's stock client, for tests/test_clients.py.
 *
 * <pre>
 * client URL scan DESCRIPTOR                 GetFlightInfo, then DoGet of its ticket; a table's name or a JSON command
 * client URL lookup COMMAND NAME:TYPE=[...]  DoExchange of the key columns, 1,000 keys a batch; values as JSON arrays
 * </pre>
 *
 * Prints what ../go/main.go prints: the schema as [name, type] pairs, one array of values a row, and {"rows", "batches",
 * "metadata"}. Timestamps are printed as their integers.
 */
public final class Client {
  private static final int KEYS_PER_BATCH = 1000;
  private static final ObjectMapper JSON = new ObjectMapper();

  public static void main(String[] arguments) throws Exception {
    if (arguments.length < 3) {
      throw new IllegalArgumentException("client URL scan DESCRIPTOR | client URL lookup COMMAND NAME:TYPE=[...]...");
    }
    try (BufferAllocator allocator = new RootAllocator();
        FlightClient client = connect(allocator, arguments[0]);
        OutputStream out = new BufferedOutputStream(System.out, 1 << 20)) {
      Printer printer = new Printer(out);
      switch (arguments[1]) {
        case "scan" -> scan(client, arguments[2], printer);
        case "lookup" -> {
          List<String> columns = List.of(arguments).subList(3, arguments.length);
          lookup(client, allocator, arguments[2], columns, printer);
        }
        default -> throw new IllegalArgumentException("no such verb: " + arguments[1]);
      }
      printer.end();
    }
  }

  /**
   * A Unix socket takes a channel of our own: flight-core up to 19.0 asks Netty's client channel to be a server's
   * (https://github.com/apache/arrow-java/issues/1039).
   */
  private static FlightClient connect(BufferAllocator allocator, String url) throws Exception {
    String unix = "grpc+unix://";
    if (!url.startsWith(unix)) {
      return FlightClient.builder(allocator, new Location(url)).build();
    }
    DefaultThreadFactory daemons = new DefaultThreadFactory("flight", true);
    return FlightGrpcUtils.createFlightClient(
        allocator,
        NettyChannelBuilder.forAddress(new DomainSocketAddress(url.substring(unix.length())))
            .channelType(EpollDomainSocketChannel.class)
            .eventLoopGroup(new MultiThreadIoEventLoopGroup(1, daemons, EpollIoHandler.newFactory()))
            .usePlaintext()
            .build());
  }

  private static FlightDescriptor descriptor(String text) {
    return text.startsWith("{")
        ? FlightDescriptor.command(text.getBytes(StandardCharsets.UTF_8))
        : FlightDescriptor.path(text);
  }

  private static void scan(FlightClient client, String text, Printer printer) throws Exception {
    FlightInfo info = client.getInfo(descriptor(text));
    for (FlightEndpoint endpoint : info.getEndpoints()) {
      try (FlightStream stream = client.getStream(endpoint.getTicket())) {
        Schema announced = info.getSchemaOptional().orElseThrow();
        if (!stream.getSchema().equals(announced)) {
          throw new IllegalStateException("announced " + announced + ", got " + stream.getSchema());
        }
        // A table without rows still has a schema.
        printer.schema(stream.getSchema());
        while (stream.next()) {
          printer.batch(stream.getRoot(), stream.getLatestMetadata());
        }
      }
    }
  }

  private static void lookup(
      FlightClient client, BufferAllocator allocator, String text, List<String> columns, Printer printer)
      throws Exception {
    List<Field> fields = new ArrayList<>();
    List<JsonNode> keys = new ArrayList<>();
    for (String column : columns) {
      String head = column.substring(0, column.indexOf('='));
      String kind = head.substring(head.indexOf(':') + 1);
      ArrowType type =
          switch (kind) {
            case "int64" -> new ArrowType.Int(64, true);
            case "utf8" -> new ArrowType.Utf8();
            default -> throw new IllegalArgumentException("keys are int64 or utf8, not " + kind);
          };
      fields.add(Field.nullable(head.substring(0, head.indexOf(':')), type));
      keys.add(JSON.readTree(column.substring(column.indexOf('=') + 1)));
    }
    if (keys.isEmpty()) {
      throw new IllegalArgumentException("a lookup needs key columns");
    }
    int count = keys.get(0).size();
    try (VectorSchemaRoot asked = VectorSchemaRoot.create(new Schema(fields), allocator);
        FlightClient.ExchangeReaderWriter exchange = client.doExchange(descriptor(text))) {
      FlightStream reader = exchange.getReader();
      exchange.getWriter().start(asked);
      for (int first = 0; first < count; first += KEYS_PER_BATCH) {
        int rows = Math.min(KEYS_PER_BATCH, count - first);
        for (int column = 0; column < keys.size(); column++) {
          fill(asked.getVector(column), keys.get(column), first, rows);
        }
        asked.setRowCount(rows);
        exchange.getWriter().putNext();
        if (!reader.next()) {
          throw new IllegalStateException("no reply to a batch of " + rows + " keys");
        }
        if (reader.getRoot().getRowCount() != rows) {
          throw new IllegalStateException(rows + " keys, " + reader.getRoot().getRowCount() + " rows");
        }
        printer.batch(reader.getRoot(), reader.getLatestMetadata());
      }
      exchange.getWriter().completed();
      if (reader.next()) {
        throw new IllegalStateException("more replies than batches");
      }
    }
  }

  private static void fill(FieldVector vector, JsonNode values, int first, int rows) {
    vector.reset();
    for (int n = 0; n < rows; n++) {
      JsonNode value = values.get(first + n);
      if (vector instanceof BigIntVector longs) {
        longs.setSafe(n, value.longValue());
      } else {
        ((VarCharVector) vector).setSafe(n, value.textValue().getBytes(StandardCharsets.UTF_8));
      }
    }
    vector.setValueCount(rows);
  }

  private static final class Printer {
    private final OutputStream out;
    private boolean begun;
    private long rows;
    private long batches;
    private JsonNode metadata = JSON.nullNode();

    Printer(OutputStream out) {
      this.out = out;
    }

    void schema(Schema schema) throws IOException {
      if (begun) {
        return;
      }
      begun = true;
      ArrayNode pairs = JSON.createArrayNode();
      for (Field field : schema.getFields()) {
        pairs.addArray().add(field.getName()).add(typeName(field));
      }
      line(pairs);
    }

    void batch(VectorSchemaRoot batch, ArrowBuf appMetadata) throws IOException {
      schema(batch.getSchema());
      batches++;
      rows += batch.getRowCount();
      if (appMetadata != null && appMetadata.readableBytes() > 0) {
        byte[] bytes = new byte[(int) appMetadata.readableBytes()];
        appMetadata.getBytes(appMetadata.readerIndex(), bytes);
        metadata = JSON.readTree(bytes);
      }
      for (int n = 0; n < batch.getRowCount(); n++) {
        ArrayNode row = JSON.createArrayNode();
        for (FieldVector column : batch.getFieldVectors()) {
          row.add(value(column, n));
        }
        line(row);
      }
    }

    void end() throws IOException {
      ObjectNode found = JSON.createObjectNode().put("rows", rows).put("batches", batches);
      line(found.set("metadata", metadata));
    }

    private void line(JsonNode node) throws IOException {
      out.write(JSON.writeValueAsBytes(node));
      out.write('\n');
    }
  }

  /** Spells types as the test does, the same in every language. */
  private static String typeName(Field field) {
    ArrowType type = field.getType();
    if (type instanceof ArrowType.Int number) {
      return (number.getIsSigned() ? "int" : "uint") + number.getBitWidth();
    } else if (type instanceof ArrowType.FloatingPoint number) {
      return number.getPrecision() == FloatingPointPrecision.SINGLE ? "float32" : "float64";
    } else if (type instanceof ArrowType.Timestamp time) {
      String zone = time.getTimezone() == null ? "" : time.getTimezone();
      return "timestamp[" + unit(time.getUnit()) + ", " + zone + "]";
    } else if (type instanceof ArrowType.FixedSizeList list) {
      return typeName(field.getChildren().get(0)) + "[" + list.getListSize() + "]";
    }
    return type.getTypeID().name().toLowerCase();
  }

  private static String unit(TimeUnit unit) {
    return switch (unit) {
      case SECOND -> "s";
      case MILLISECOND -> "ms";
      case MICROSECOND -> "us";
      case NANOSECOND -> "ns";
    };
  }

  private static JsonNode value(ValueVector column, int n) {
    var json = JSON.getNodeFactory();
    if (column.isNull(n)) {
      return json.nullNode();
    } else if (column instanceof BitVector bits) {
      return json.booleanNode(bits.get(n) != 0);
    } else if (column instanceof TinyIntVector numbers) {
      return json.numberNode(numbers.get(n));
    } else if (column instanceof SmallIntVector numbers) {
      return json.numberNode(numbers.get(n));
    } else if (column instanceof IntVector numbers) {
      return json.numberNode(numbers.get(n));
    } else if (column instanceof BigIntVector numbers) {
      return json.numberNode(numbers.get(n));
    } else if (column instanceof UInt1Vector numbers) {
      return json.numberNode(numbers.getObjectNoOverflow(n));
    } else if (column instanceof UInt2Vector numbers) {
      return json.numberNode((int) numbers.get(n));
    } else if (column instanceof UInt4Vector numbers) {
      return json.numberNode(numbers.getObjectNoOverflow(n));
    } else if (column instanceof UInt8Vector numbers) {
      return json.numberNode(numbers.getObjectNoOverflow(n));
    } else if (column instanceof Float4Vector numbers) {
      return json.numberNode((double) numbers.get(n));
    } else if (column instanceof Float8Vector numbers) {
      return json.numberNode(numbers.get(n));
    } else if (column instanceof VarCharVector texts) {
      return json.textNode(new String(texts.get(n), StandardCharsets.UTF_8));
    } else if (column instanceof TimeStampVector times) {
      return json.numberNode(times.get(n));
    } else if (column instanceof FixedSizeListVector lists) {
      ArrayNode values = JSON.createArrayNode();
      for (int at = lists.getElementStartIndex(n); at < lists.getElementEndIndex(n); at++) {
        values.add(value(lists.getDataVector(), at));
      }
      return values;
    }
    throw new IllegalArgumentException("this client prints no " + column.getField());
  }
}
