// Reads from Pinion with arrow-go's stock Flight client, for tests/test_clients.py.
//
//	client URL scan DESCRIPTOR                 GetFlightInfo, then DoGet of its ticket; a table's name or a JSON command
//	client URL lookup COMMAND NAME:TYPE=[...]  DoExchange of the key columns, 1,000 keys a batch; values as JSON arrays
//
// Prints JSON lines: the schema as [name, type] pairs, one array of values a row, and {"rows", "batches", "metadata"}.
// Timestamps are printed as their integers, floats as the shortest text of their float64.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const keysPerBatch = 1000

func main() {
	out := bufio.NewWriterSize(os.Stdout, 1<<20)
	err := run(os.Args[1:], out)
	if flushed := out.Flush(); err == nil {
		err = flushed
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(arguments []string, out io.Writer) error {
	if len(arguments) < 3 {
		return errors.New("usage: client URL scan DESCRIPTOR | client URL lookup COMMAND NAME:TYPE=[...]...")
	}
	// grpc-go's names: host:port, and unix:///path.
	address := strings.TrimPrefix(strings.TrimPrefix(arguments[0], "grpc://"), "grpc+")
	client, err := flight.NewClientWithMiddleware(address, nil, nil, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer client.Close()
	printer := &printer{encoder: json.NewEncoder(out)}
	switch arguments[1] {
	case "scan":
		err = scan(client, arguments[2], printer)
	case "lookup":
		err = lookup(client, arguments[2], arguments[3:], printer)
	default:
		err = fmt.Errorf("no such verb: %s", arguments[1])
	}
	if err != nil {
		return err
	}
	return printer.end()
}

func descriptor(text string) *flight.FlightDescriptor {
	if strings.HasPrefix(text, "{") {
		return &flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: []byte(text)}
	}
	return &flight.FlightDescriptor{Type: flight.DescriptorPATH, Path: []string{text}}
}

func scan(client flight.Client, text string, printer *printer) error {
	ctx := context.Background()
	info, err := client.GetFlightInfo(ctx, descriptor(text))
	if err != nil {
		return err
	}
	announced, err := flight.DeserializeSchema(info.GetSchema(), memory.DefaultAllocator)
	if err != nil {
		return err
	}
	for _, endpoint := range info.GetEndpoint() {
		stream, err := client.DoGet(ctx, endpoint.GetTicket())
		if err != nil {
			return err
		}
		reader, err := flight.NewRecordReader(stream)
		if err != nil {
			return err
		}
		if !reader.Schema().Equal(announced) {
			return fmt.Errorf("announced %v, got %v", announced, reader.Schema())
		}
		for reader.Next() {
			if err := printer.batch(reader.RecordBatch(), reader.LatestAppMetadata()); err != nil {
				return err
			}
		}
		if err := reader.Err(); err != nil {
			return err
		}
		// A table without rows still has a schema.
		if err := printer.schema(reader.Schema()); err != nil {
			return err
		}
		reader.Release()
	}
	return nil
}

func lookup(client flight.Client, text string, columns []string, printer *printer) error {
	keys, err := keyBatch(columns)
	if err != nil {
		return err
	}
	stream, err := client.DoExchange(context.Background())
	if err != nil {
		return err
	}
	writer := flight.NewRecordWriter(stream, ipc.WithSchema(keys.Schema()))
	writer.SetFlightDescriptor(descriptor(text))
	var reader *flight.Reader
	for first := int64(0); first < keys.NumRows(); first += keysPerBatch {
		asked := keys.NewSlice(first, min(first+keysPerBatch, keys.NumRows()))
		if err := writer.Write(asked); err != nil {
			return err
		}
		if reader == nil {
			if reader, err = flight.NewRecordReader(stream); err != nil {
				return err
			}
		}
		reply, err := reader.Read()
		if err != nil {
			return err
		}
		if reply.NumRows() != asked.NumRows() {
			return fmt.Errorf("%d keys, %d rows", asked.NumRows(), reply.NumRows())
		}
		if err := printer.batch(reply, reader.LatestAppMetadata()); err != nil {
			return err
		}
	}
	if err := writer.Close(); err != nil {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := reader.Read(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the last batch: %w", err)
	}
	return nil
}

func keyBatch(columns []string) (arrow.RecordBatch, error) {
	fields := make([]arrow.Field, len(columns))
	arrays := make([]arrow.Array, len(columns))
	for n, column := range columns {
		head, values, _ := strings.Cut(column, "=")
		name, kind, _ := strings.Cut(head, ":")
		types := map[string]arrow.DataType{"int64": arrow.PrimitiveTypes.Int64, "utf8": arrow.BinaryTypes.String}
		if types[kind] == nil {
			return nil, fmt.Errorf("keys are int64 or utf8, not %s", kind)
		}
		made, _, err := array.FromJSON(memory.DefaultAllocator, types[kind], strings.NewReader(values))
		if err != nil {
			return nil, err
		}
		fields[n] = arrow.Field{Name: name, Type: types[kind]}
		arrays[n] = made
	}
	if len(arrays) == 0 {
		return nil, errors.New("a lookup needs key columns")
	}
	return array.NewRecordBatch(arrow.NewSchema(fields, nil), arrays, int64(arrays[0].Len())), nil
}

type printer struct {
	encoder       *json.Encoder
	begun         bool
	rows, batches int64
	metadata      json.RawMessage
}

func (p *printer) schema(schema *arrow.Schema) error {
	if p.begun {
		return nil
	}
	p.begun = true
	pairs := make([][2]string, schema.NumFields())
	for n, field := range schema.Fields() {
		pairs[n] = [2]string{field.Name, typeName(field.Type)}
	}
	return p.encoder.Encode(pairs)
}

func (p *printer) batch(batch arrow.RecordBatch, metadata []byte) error {
	if err := p.schema(batch.Schema()); err != nil {
		return err
	}
	p.batches++
	p.rows += batch.NumRows()
	if len(metadata) > 0 {
		p.metadata = append(json.RawMessage(nil), metadata...)
	}
	row := make([]any, batch.NumCols())
	for n := range int(batch.NumRows()) {
		for c, column := range batch.Columns() {
			found, err := value(column, n)
			if err != nil {
				return err
			}
			row[c] = found
		}
		if err := p.encoder.Encode(row); err != nil {
			return err
		}
	}
	return nil
}

func (p *printer) end() error {
	return p.encoder.Encode(map[string]any{"rows": p.rows, "batches": p.batches, "metadata": p.metadata})
}

// typeName spells types as the test does, the same in every language.
func typeName(kind arrow.DataType) string {
	switch kind := kind.(type) {
	case *arrow.TimestampType:
		return fmt.Sprintf("timestamp[%v, %s]", kind.Unit, kind.TimeZone)
	case *arrow.FixedSizeListType:
		return fmt.Sprintf("%s[%d]", typeName(kind.Elem()), kind.Len())
	default:
		return kind.Name()
	}
}

func value(column arrow.Array, n int) (any, error) {
	if column.IsNull(n) {
		return nil, nil
	}
	switch column := column.(type) {
	case *array.Boolean:
		return column.Value(n), nil
	case *array.Int8:
		return column.Value(n), nil
	case *array.Int16:
		return column.Value(n), nil
	case *array.Int32:
		return column.Value(n), nil
	case *array.Int64:
		return column.Value(n), nil
	case *array.Uint8:
		return column.Value(n), nil
	case *array.Uint16:
		return column.Value(n), nil
	case *array.Uint32:
		return column.Value(n), nil
	case *array.Uint64:
		return column.Value(n), nil
	case *array.Float32:
		return float64(column.Value(n)), nil
	case *array.Float64:
		return column.Value(n), nil
	case *array.String:
		return column.Value(n), nil
	case *array.Timestamp:
		return int64(column.Value(n)), nil
	case *array.FixedSizeList:
		from, to := column.ValueOffsets(n)
		values := make([]any, 0, to-from)
		for at := from; at < to; at++ {
			element, err := value(column.ListValues(), int(at))
			if err != nil {
				return nil, err
			}
			values = append(values, element)
		}
		return values, nil
	default:
		return nil, fmt.Errorf("this client prints no %s", column.DataType())
	}
}
